"""Renders chat templates. Run as a script, in a process of its own, by `chat_template.py`.

A template is a program that came with a download. What it may reach is bounded by jinja2's sandbox; how long it runs
and what it allocates only by the limits of a process: `'x' * 10 ** 10` and `3 ** (10 ** 9)` are one step each, so no
count of steps bounds them. So this file imports nothing of the package: it starts in the time that jinja2 takes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, conversations: list[dict[str, Any]]) -> list[str]:
    """The template's text for each set of variables, in the environment transformers gives it.

    Source: `transformers.utils.chat_template_utils`.

    Raises:
        jinja2.TemplateError: no template, it refuses these messages, or it reaches for what the sandbox forbids.
        Exception: whatever else a template can be made to raise.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    compiled = environment.from_string(template)
    return [compiled.render(variables) for variables in conversations]


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Without the escapes for HTML that jinja2's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _limit(memory: int, seconds: int) -> None:
    """Bound what this process may allocate and compute, as far as the system does that."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        with contextlib.suppress(OSError, ValueError):  # ValueError: the system's own limit is lower
            resource.setrlimit(kind, (most, most))


def main() -> None:
    """A request on stdin, an answer on stdout: JSON objects, `text` (a list) or `error` (a line)."""
    request = json.load(sys.stdin.buffer)
    _limit(request["memory"], request["seconds"])
    try:
        text = render(request["template"], request["conversations"])
        size = sum(map(len, text))
        answer: dict[str, Any] = {"text": text}
        if size > request["characters"]:
            answer = {"error": f"it writes {size} characters, {request['characters']} are the most"}
    except MemoryError:
        answer = {"error": "it allocates too much memory"}
    except Exception as e:  # it is the template's, whatever it is
        kind = "" if type(e) is jinja2.TemplateError else f"{type(e).__name__}: "
        answer = {"error": f"{kind}{e}"[:500]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
