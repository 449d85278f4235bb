"""Chat templates: where a checkpoint keeps its own, the built-in ones, and rendering them within limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import msgspec

from flashinfer.errors import ChatTemplateError
from flashinfer.text.config import SpecialTokens, TokenizerConfig, read_json, read_tokenizer_config

_BUILT_IN = Path(__file__).parent / "templates"
_RENDER = Path(__file__).parent / "render.py"
_LIMITS: Final = {"memory": 512 << 20, "seconds": 5, "characters": 16 << 20}
"""Address space in bytes, processor time, and length of the text of one rendering."""
_PATIENCE = 60.0
"""Seconds a rendering may take by the clock, should its process be kept from computing."""


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def opening(system: str | None) -> list[Message]:
    """What a conversation begins with: the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, as transformers' `apply_chat_template` takes it.

    source: jinja2. where: what messages call it. tokens: texts of special tokens by the names it knows them by
    (`bos_token`, ...), as far as the checkpoint's configuration files have them.
    """

    source: str
    where: str
    tokens: Mapping[str, str]

    def render(self, *conversations: Sequence[Message], next_answer: bool = True) -> list[str]:
        """The text of each conversation; with `next_answer`, up to where the model is to go on.

        Runs in a process of its own, which bounds its time and memory, and ends with it.

        Raises:
            ChatTemplateError: it is no template, refuses the messages, takes too long, allocates or writes too much,
                or reaches for what it must not.
        """
        common = {**self.tokens, "tools": None, "documents": None, "add_generation_prompt": next_answer}
        given = [{**common, "messages": messages} for messages in conversations]
        answer = self._answer(json.dumps({"template": self.source, "conversations": given, **_LIMITS}).encode())
        if "error" in answer:
            raise self._refused(answer["error"])
        text: list[str] = answer["text"]
        return text

    def _answer(self, request: bytes) -> dict[str, Any]:
        # -P: the script's folder must not come first on its path, its modules have the names of others
        command = [sys.executable, "-P", str(_RENDER)]
        try:
            done = subprocess.run(command, input=request, capture_output=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired as e:
            raise self._refused(f"it took longer than {_PATIENCE:.0f} s") from e
        except OSError as e:
            raise self._refused(f"no process could be started to render it in ({e.strerror})") from e
        if done.returncode < 0:
            limits = f"{_LIMITS['seconds']} s of processor time, or {_LIMITS['memory'] >> 20} MiB"
            raise self._refused(f"it took more than {limits}")
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise self._refused(f"rendering failed ({last})")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _refused(self, reason: str) -> ChatTemplateError:
        return ChatTemplateError(
            f"{self.where} cannot be used: {reason}; give another with --chat-template: "
            f"{', '.join(built_in())}, or a file"
        )


def built_in() -> list[str]:
    """Names of the templates for models that predate the convention of carrying one."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.jinja"))


def load_chat_template(files: Mapping[str, Path], chosen: str | None = None) -> ChatTemplate:
    """The chat template of a checkpoint whose text files are `files`, by the names the checkpoint used.

    chosen: instead, the name of a built-in one, or a file. Of the checkpoint, `chat_template.jinja` comes first, then
    `chat_template.json`, then `tokenizer_config.json`; of several by name, the one called `default`.

    Raises:
        ChatTemplateError: there is none, or `chosen` is neither built in nor a readable file.
        StoreError: a file of the store is damaged.
    """
    config = read_tokenizer_config(files)
    named = {name: config.content(getattr(config, name)) for name in SpecialTokens.__struct_fields__}
    tokens = {name: text for name, text in named.items() if text is not None}
    if chosen is not None:
        return ChatTemplate(_chosen(chosen), f"chat template {chosen}", tokens)
    source = _carried(files, config)
    if source is None:
        raise ChatTemplateError(
            "the store has no chat template; choose the one this model was trained with: "
            f"--chat-template {', '.join(built_in())}, or a file"
        )
    return ChatTemplate(source, "the chat template of the store", tokens)


def _chosen(name: str) -> str:
    path = _BUILT_IN / f"{name}.jinja" if name in built_in() else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ChatTemplateError(f"chat template {name} is not UTF-8 (byte {e.start}); give a text file") from e
    except OSError as e:
        raise ChatTemplateError(
            f"chat template {name} is neither built in ({', '.join(built_in())} are) nor a file that can be read: "
            f"{e.strerror}"
        ) from e


class _TemplateFile(msgspec.Struct, frozen=True):
    """`chat_template.json`."""

    chat_template: str


def _carried(files: Mapping[str, Path], config: TokenizerConfig) -> str | None:
    if path := files.get("chat_template.jinja"):
        return path.read_text(encoding="utf-8", errors="replace")
    if path := files.get("chat_template.json"):
        return read_json(path, _TemplateFile).chat_template
    if config.chat_template is None or isinstance(config.chat_template, str):
        return config.chat_template
    by_name = {entry.name: entry.template for entry in config.chat_template}
    if by_name and "default" not in by_name:
        raise ChatTemplateError(
            f"the store's chat templates are {', '.join(by_name)}, none of them is called default; write the one you "
            "want to a file and give it with --chat-template"
        )
    return by_name.get("default")
