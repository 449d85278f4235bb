"""`flashinfer chat` and `generate --chat` on a fake engine: what is read, what is written where, and the commands."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashinfer.generate
from flashinfer import cli
from flashinfer.generate import TextModel
from flashinfer.text import ChatTemplate
from tests.generate.fake import FakeEngine, fake_model
from tests.text.chat_templates import messages
from tests.text.in_process import render_in_process

LETTERS = "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
Chatting = Callable[..., tuple[int, str, str]]


class Loaded:
    """Stands in for `load` and `chat_template_of`; keeps what it was called with."""

    def __init__(self) -> None:
        self.model: TextModel
        self.engine: FakeEngine
        self.arguments: dict[str, Any] = {}
        self.says("hello.")

    def says(self, script: str, context: int = 64) -> None:
        self.model, self.engine = fake_model(script, context=context)

    def load(self, store: Path, **arguments: Any) -> TextModel:
        self.arguments = arguments
        if callable(arguments["context"]):
            self.arguments["context"] = arguments["context"](self.model.tokenizer)
        return self.model

    def template(self, store: Path, chosen: str | None) -> ChatTemplate:
        return ChatTemplate(chosen or LETTERS, "the template", {})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    fake = Loaded()
    monkeypatch.setattr(flashinfer.generate, "load", fake.load)
    monkeypatch.setattr(flashinfer.generate, "chat_template_of", fake.template)
    render_in_process(monkeypatch)
    return fake


@pytest.fixture
def chatting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Chatting]:
    """Run `flashinfer chat` with these lines on stdin; its status, stdout and stderr."""

    def chat(data: str | bytes, *options: str, terminal: bool = False) -> tuple[int, str, str]:
        stdin = io.TextIOWrapper(io.BytesIO(data if isinstance(data, bytes) else data.encode()))
        monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        status = cli.main(["chat", "a.flash", *options])
        return status, *capsys.readouterr()

    return chat


def test_a_line_a_message(loaded: Loaded, chatting: Chatting) -> None:
    assert chatting("ab\r\n\ncd") == (0, "hello\nhello\n", "")
    assert loaded.engine.closes == 1


def test_options_reach_the_model(loaded: Loaded, chatting: Chatting) -> None:
    options = [
        "--memory",
        "1GiB",
        "--context",
        "32",
        "--predictor",
        "low-rank:0.98",
        "--kv-type",
        "f16",
        "--window",
        "9",
    ]
    assert chatting("ab\n", *options, "-n", "3", "--temperature", "0")[:2] == (0, "hel\n")
    expected = {"memory": 1 << 30, "context": 32, "predictor": "low-rank:0.98", "kv_type": "f16", "window": 9}
    assert {name: loaded.arguments[name] for name in expected} == expected


@pytest.mark.parametrize("options", [["-n", "0"], ["--top-p", "7"], ["--memory", "x"], ["--stop", ""]])
def test_wrong_usage(loaded: Loaded, chatting: Chatting, options: list[str]) -> None:
    status, out, err = chatting("ab\n", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_the_system_message_and_the_template(loaded: Loaded, chatting: Chatting, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chatting(f"ab\n/save {file}\n", "--system", "be brief", "--chat-template", LETTERS + "{{ 'now.' }}")
    assert json.loads(file.read_text())["messages"] == messages("ab", "hello", system="be brief")
    assert bytes(loaded.model.tokenizer.decode(loaded.engine.asked[0]), "utf-8") == b"be brief.ab.now."


def test_reset_save_and_load(loaded: Loaded, chatting: Chatting, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    chatting(f"ab\n/save {first}\n/reset\n/load {first}\ncd\n/save {second}\n/exit\nnever\n")
    assert json.loads(first.read_text())["messages"] == messages("ab", "hello")
    assert json.loads(second.read_text())["messages"][:3] == messages("ab", "hello", "cd")
    assert len(loaded.engine.asked) == len("hello.") + len("hello.")


def test_stats_and_help_go_to_stderr(loaded: Loaded, chatting: Chatting) -> None:
    status, out, err = chatting("/stats\nab\n/stats\n/help\n")
    assert (status, out) == (0, "hello\n")
    lines = err.splitlines()
    assert lines[0].startswith("so far: ")
    assert lines[1].startswith("last answer: 6 tokens (stop), first after ")
    for part in (
        "tokens/s",
        "read per token",
        "hit rate",
        "context 8 of 64 tokens",
        "memory cap 1.00 GiB",
        "peak memory",
    ):
        assert part in lines[2]
    assert [line.split()[0] for line in lines[3:]] == ["/reset", "/save", "/load", "/stats", "/help", "/exit"]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/nonsense", "'/nonsense' is no command; they are /reset"),
        ("/save", "'/save' is no command"),
        ("/reset now", "is no command"),
        ("/load /no/such/file", "cannot be read: No such file"),
        ("a" * 70, "leaves no room in the context of 64"),
        (b"caf\xe9", "not UTF-8 (byte 3 of its line)"),
    ],
)
def test_an_error_ends_it_where_nobody_can_try_again(
    loaded: Loaded, chatting: Chatting, line: str | bytes, part: str
) -> None:
    data = (line if isinstance(line, bytes) else line.encode()) + b"\nab\n"
    status, out, err = chatting(data)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("flashinfer: error: ")
    assert part in err


def at_terminal(monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]) -> None:
    """What `input` gives, or raises, one after the other; then the end of the input."""
    lines = iter(typed)

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_at_a_terminal_an_error_is_shown_and_it_goes_on(
    loaded: Loaded, chatting: Chatting, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_terminal(monkeypatch, "/nonsense", "a" * 70, "ab")
    status, out, err = chatting("", terminal=True)
    assert (status, out) == (0, "hello\n")
    greeting, nonsense, long, last = err.splitlines()
    assert greeting == "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends"
    assert nonsense.startswith("error: '/nonsense' is no command")
    assert long.startswith("error: the conversation has 71 tokens")
    assert last == ""


def test_ctrl_c_at_the_prompt_ends_it(loaded: Loaded, chatting: Chatting, monkeypatch: pytest.MonkeyPatch) -> None:
    at_terminal(monkeypatch, "ab", KeyboardInterrupt, "never")
    assert chatting("", terminal=True)[:2] == (0, "hello\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_stops_the_answer_only(
    loaded: Loaded, chatting: Chatting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool
) -> None:
    loaded.says("hello you.")
    step, count, file = loaded.engine.step, iter(range(100)), tmp_path / "talk.json"

    def struck(session: Any, tokens: list[int]) -> np.ndarray:
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(session, tokens)

    monkeypatch.setattr(loaded.engine, "step", struck)
    at_terminal(monkeypatch, "ab", "cd", f"/save {file}")
    assert chatting(f"ab\ncd\n/save {file}\n", terminal=terminal)[:2] == (0, "hel\nlo you\n")
    assert json.loads(file.read_text())["messages"] == messages("ab", "hel", "cd", "lo you")


def test_ctrl_c_before_the_answer_begins(
    loaded: Loaded, chatting: Chatting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the template is rendered: for the first message, that is the second time."""
    render, count, file = ChatTemplate._answer, iter(range(100)), tmp_path / "talk.json"

    def struck(self: ChatTemplate, request: bytes) -> dict[str, Any]:
        if next(count) == 1:
            raise KeyboardInterrupt
        return render(self, request)

    monkeypatch.setattr(ChatTemplate, "_answer", struck)
    assert chatting(f"ab\ncd\n/save {file}\n") == (0, "\nhello\n", "")
    assert json.loads(file.read_text())["messages"] == messages("cd", "hello")


def test_a_full_context_is_said(loaded: Loaded, chatting: Chatting) -> None:
    loaded.says("hello ", context=10)
    status, out, err = chatting("ab\n")
    assert (status, out) == (0, "hello h\n")
    assert err == "(the context of 10 tokens is full: /reset, or start with --context-shift)\n"
    loaded.says("hello ", context=10)
    assert chatting("ab\nab\nab\n", "--context-shift", "-n", "5") == (0, "hello\nhell\no hel\n", "")


def test_a_broken_cap_is_an_error_after_all_answers(loaded: Loaded, chatting: Chatting) -> None:
    loaded.engine.over_cap = True
    assert chatting("ab\n") == (1, "hello\n", "flashinfer: error: grew beyond the cap\n")


def test_an_approximation_is_named(loaded: Loaded, chatting: Chatting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(loaded.engine.choice), "note", "low-rank at 98 %")
    assert chatting("") == (0, "", "(low-rank at 98 %)\n")


def test_generate_with_a_message(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a.flash", "-p", "ab", "--chat", "--system", "be", "-n", "9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert loaded.model.tokenizer.decode(result["prompt_tokens"]) == "be.ab."
    assert (result["text"], result["finish_reason"]) == ("hello", "stop")
    assert loaded.arguments["context"] == len("be.ab.") + 9


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--system", "be"], "give --chat as well"),
        (["--chat-template", "vicuna"], "give --chat as well"),
        (["--chat", "--session", "x"], "use `flashinfer chat`"),
    ],
)
def test_generate_options_that_do_not_go_together(
    loaded: Loaded, options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "a.flash", "-p", "x", *options]) == 2
    assert part in capsys.readouterr().err
