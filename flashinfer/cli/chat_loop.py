"""The loop of `flashinfer chat`: what is typed, and what is done about it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flashinfer.errors import FlashInferError, PromptError
from flashinfer.units import format_size

if TYPE_CHECKING:
    from flashinfer.generate import Chat, Generation, TextModel

HELP: Final = {
    "/reset": "begin a new conversation",
    "/save FILE": "write the conversation to FILE (JSON)",
    "/load FILE": "go on with the conversation in FILE",
    "/stats": "speed, bytes read and memory so far",
    "/help": "this list",
    "/exit": "end the program; so does Ctrl-D. Ctrl-C stops an answer, and ends the program where none is written",
}
"""The commands and what they do."""


@dataclass
class Talk:
    """A conversation at a terminal, or line by line from a pipe. Answers go to stdout, all else to stderr.

    options: of `Chat.reply`. last: the newest answer.
    """

    model: TextModel
    chat: Chat
    options: dict[str, Any]
    on_terminal: bool
    last: Generation | None = None

    def read(self) -> str | None:
        """The next line; None at the end: of the input, or by Ctrl-C at the prompt."""
        if self.on_terminal:
            try:
                return input("> ")
            except (EOFError, KeyboardInterrupt):
                say("")
                return None
        line = sys.stdin.buffer.readline()
        if not line:
            return None
        try:
            return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as e:
            raise PromptError(f"a message on stdin is not UTF-8 (byte {e.start} of its line)") from e

    def answer(self, text: str) -> None:
        """Write the model's answer to `text` as it comes; Ctrl-C ends it there."""
        try:
            stream = self.chat.reply(text, **self.options)
        except KeyboardInterrupt:  # before it was known what to answer: as if nothing had been asked
            print(flush=True)
            return
        begun = False
        try:
            for piece in stream:
                sys.stdout.write(piece if begun else piece.lstrip())
                sys.stdout.flush()
                begun = begun or bool(piece.strip())
        except KeyboardInterrupt:
            stream.close()
        finally:
            print(flush=True)
        self.last = stream.result
        if self.last.finish_reason == "context":
            say(f"(the context of {self.model.plan.context} tokens is full: /reset, or start with --context-shift)")

    def obey(self, line: str) -> bool:
        """Do what a line beginning with / asks for; False where it is to end."""
        name, _, file = line.partition(" ")
        match name, file.strip():
            case "/exit", "":
                return False
            case "/reset", "":
                self.chat.reset()
            case "/save", str(path) if path:
                self.chat.save(Path(path).expanduser())
            case "/load", str(path) if path:
                self.chat.load(Path(path).expanduser())
            case "/stats", "":
                say(self.stats())
            case "/help", "":
                say("\n".join(f"{name:12} {what}" for name, what in HELP.items()))
            case _:
                raise PromptError(f"{line!r} is no command; they are {', '.join(HELP)}")
        return True

    def stats(self) -> str:
        """The last answer, and the program so far, in two lines."""
        from flashinfer.machine import peak_resident_bytes

        decode, plan = self.model.ledger.decode, self.model.plan
        lines = []
        if self.last is not None:
            last, t, prompt = self.last, self.last.timings, len(self.last.prompt_tokens)
            lines.append(
                f"last answer: {len(last.tokens)} tokens ({last.finish_reason}), first after {t.first_token:.2f} s, "
                f"then {t.decode_tokens_per_second:.3g} tokens/s; {self.chat.reused} of {prompt} before it were kept"
            )
        lines.append(
            f"so far: {decode.tokens_per_second:.3g} tokens/s, {format_size(decode.bytes_per_token)} read per token, "
            f"hit rate {decode.hit_rate:.1%}; context {self.chat.length} of {plan.context} tokens; "
            f"{plan.cap_kind} cap {format_size(plan.cap)}, peak memory {format_size(peak_resident_bytes())}"
        )
        return "\n".join(lines)


def converse(talk: Talk) -> None:
    """Answer until the input ends, or is told to. On a terminal an error is shown and the next line awaited.

    Raises:
        FlashInferError: an error, where there is nobody to read of it and try again.
    """
    if talk.on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines and remembers them with it
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    if talk.model.choice.note:
        say(f"({talk.model.choice.note})")
    while (line := talk.read()) is not None:
        try:
            if line.startswith("/"):
                if not talk.obey(line):
                    return
            elif line.strip():
                talk.answer(line)
        except FlashInferError as e:
            if not talk.on_terminal:
                raise
            say(f"error: {' '.join(str(e).split())}")


def say(text: str) -> None:
    """To the person, not into what the program writes."""
    print(text, file=sys.stderr, flush=True)
