"""Conversations with the program itself: through a pipe, at a terminal, interrupted, with good templates and bad."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashinfer.text import load_tokenizer
from tests.e2e.program import DEMO, ENVIRONMENT, PROMPT, assert_failed, command, ended, flashinfer_with
from tests.text.chat_templates import CHATML

GREEDY = ("--chat-template", "vicuna", "--temperature", "0")
PATIENCE = 60.0


def test_a_conversation_through_a_pipe_below_its_cap(demo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    options = (*GREEDY, "-n", "12", "--system", "Be kind.", "--memory", "120MiB")
    done = flashinfer_with("chat", demo, *options, input=f"{PROMPT}\nAnd then?\n/stats\n/save {saved}\nThe end?\n")
    assert done.returncode == 0, done.stderr
    assert "memory cap 120 MiB" in done.stderr
    assert " before it were kept" in done.stderr
    said = [m["content"] for m in json.loads(saved.read_text())["messages"]]
    assert (said[0], said[1], said[3]) == ("Be kind.", PROMPT, "And then?")
    resumed = flashinfer_with("chat", demo, *options, input=f"/load {saved}\nThe end?\n")
    assert done.stdout == "".join(text.lstrip() + "\n" for text in said[2::2]) + resumed.stdout
    asked = flashinfer_with("generate", demo, "--chat", *options, "-p", PROMPT)
    assert asked.stdout == said[2] + "\n"


def test_the_template_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint, store = tmp_path / "checkpoint", tmp_path / "store"
    shutil.copytree(DEMO, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(CHATML)
    assert flashinfer_with("pack", checkpoint, store).returncode == 0
    done = flashinfer_with("generate", store, "--chat", "-p", "Hi", "-n", "4", "--temperature", "0", "--json")
    assert done.returncode == 0, done.stderr
    path = checkpoint / "tokenizer.model"
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"  # this template writes no BOS
    expected = load_tokenizer({path.name: path}).encode(text, add_bos=False)
    assert json.loads(done.stdout)["prompt_tokens"] == expected


@pytest.mark.parametrize("arguments", [("generate", "--chat", "-p", "Hi"), ("chat",)])
def test_no_template_at_all_lists_the_built_in_ones(demo: Path, arguments: tuple[str, ...]) -> None:
    done = flashinfer_with(arguments[0], demo, *arguments[1:])
    assert_failed(done, "no chat template", "--chat-template alpaca, dolly, guanaco, openassistant, redpajama, ")


def test_a_hostile_template(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.jinja"
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    done = flashinfer_with("generate", demo, "--chat", "-p", "Hi", "--chat-template", file)
    assert_failed(done, "hostile.jinja cannot be used: SecurityError")


class Terminal:
    """The program at a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *arguments: str | Path) -> None:
        self.keyboard, side = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments), stdin=side, stdout=side, stderr=side, env=ENVIRONMENT | {"TERM": "dumb"},
            start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(side)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def wait_for(self, text: str) -> str:
        """Everything shown until `text` is, which it ends with."""
        give_up = time.monotonic() + PATIENCE
        while text not in self.shown and time.monotonic() < give_up:
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.keyboard, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        before, found, self.shown = self.shown.partition(text)
        assert found, f"never shown: {text!r}; but {before!r}"
        return before + found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(demo: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", demo, *GREEDY, "--context-shift", "--weight-memory", "2MiB")
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(terminal: Terminal) -> None:
    """Without -n an answer of the embedded model has hundreds of tokens: there is time to stop it.

    (Ctrl-C at the prompt is tested in tests/cli: just after the prompt appears, Python's readline may overlook it.)
    """
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type(f"{PROMPT}\n")
    terminal.wait_for(f"{PROMPT}\r\n")
    terminal.wait_for(" ")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("/stats\n")
    terminal.wait_for("last answer: ")
    assert "tokens (cancelled)" in terminal.wait_for(" first after")
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("error: '/nonsense' is no command")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(PATIENCE) == 0


def test_ctrl_c_with_a_pipe_stops_the_answer(demo: Path) -> None:
    process = subprocess.Popen(
        command("chat", demo, *GREEDY, "--context-shift", "--weight-memory", "2MiB"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{PROMPT}\n".encode())
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    while process.stdout.read(1) != b"\n":  # the end of the answer that was stopped
        pass
    process.stdin.write(b"/stats\n")
    process.stdin.close()
    process.stdin = None
    done = ended(process)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("last answer: ")
    assert "(cancelled)" in done.stderr
