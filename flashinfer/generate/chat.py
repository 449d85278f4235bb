"""A conversation: messages, and keys and values that stay from turn to turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from flashinfer.errors import PromptError, SessionError
from flashinfer.generate.live import LiveSession
from flashinfer.generate.stream import Stream
from flashinfer.generate.text_model import TextModel
from flashinfer.text import ChatFormat, Message, opening

SCHEMA_VERSION = 1
"""Of the files `Chat.save` writes."""


class _Saved(msgspec.Struct, frozen=True):
    schema_version: int
    messages: list[Message]


class Chat:
    """A conversation with a model; a context manager, not thread-safe.

    Every turn is rendered anew from all messages. What its tokens share with the turn before is not computed again:
    as a rule all but the new message. Where the text of an answer makes other tokens than the answer had, or the
    template changes what it wrote before, more is.
    """

    def __init__(
        self, model: TextModel, form: ChatFormat, *, system: str | None = None, context_shift: bool = False
    ) -> None:
        """context_shift: a conversation that has outgrown the context forgets its oldest turns, instead of ending."""
        self._model, self._form, self._shift = model, form, context_shift
        self._system = system
        self._messages = opening(system)
        self._live, self._end = LiveSession(), form.turn_end()
        self._pending: Stream | None = None

    @property
    def messages(self) -> list[Message]:
        """All messages so far. An answer that was stopped is as long as it was read; one that never began is none."""
        self._settle()
        return list(self._messages)

    @property
    def reused(self) -> int:
        """How many tokens of the last prompt were not computed again."""
        return self._live.reused

    @property
    def length(self) -> int:
        """Tokens in the context."""
        return len(self._live.tokens)

    def reply(
        self, text: str, *, max_new_tokens: int | None = None, stop: Sequence[str] = (), **sampling: Any
    ) -> Stream:
        """The answer to `text`, piece by piece. Stop reading at any time: the next turn goes on from there.

        max_new_tokens: None is as many as the context has room for. sampling: as in `TextModel.stream`.

        Raises:
            PromptError: the conversation has outgrown the context. ChatTemplateError: the template refuses it. The
                conversation is then as it was. ValueError, FlashInferError: as `TextModel.stream`.
        """
        messages, tokens = self._fitting([*self.messages, {"role": "user", "content": text}])
        stream = self._model.stream(
            tokens, max_new_tokens=max_new_tokens or self._model.plan.context, stop=[*stop, *self._end.texts],
            context_shift=self._shift, live=self._live, end_tokens=self._end.tokens, **sampling,
        )  # fmt: skip
        self._messages, self._pending = messages, stream
        return stream

    def reset(self) -> None:
        """Begin a new conversation, with the same system message."""
        self._settle()
        self._messages = opening(self._system)

    def save(self, path: Path) -> None:
        """Write the messages to a JSON file. Raises SessionError where that fails."""
        document = {"schema_version": SCHEMA_VERSION, "messages": self.messages}
        try:
            path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as e:
            raise SessionError(f"the conversation cannot be written to {path}: {e.strerror}") from e

    def load(self, path: Path) -> None:
        """Go on with the messages of a file that `save` wrote. Raises SessionError where it cannot be used."""
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
        except OSError as e:
            raise SessionError(f"the conversation {path} cannot be read: {e.strerror}") from e
        except msgspec.DecodeError as e:
            raise SessionError(f"{path} is not a saved conversation ({e}); give a file that /save wrote") from e
        if saved.schema_version != SCHEMA_VERSION:
            raise SessionError(f"{path} is of version {saved.schema_version}, this program reads {SCHEMA_VERSION}")
        self._settle()
        self._messages = saved.messages

    def close(self) -> None:
        """End the answer that is being read, and drop keys and values. Idempotent."""
        self._settle()
        self._live.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(self) -> None:
        """Add the last answer to the messages, as far as it was read."""
        if self._pending is None:
            return
        self._pending.close()
        result, self._pending = self._pending.result, None
        if result.text or result.finish_reason != "cancelled":
            self._messages.append({"role": "assistant", "content": result.text})
        else:
            self._messages.pop()

    def _fitting(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The conversation and its tokens; without its oldest turns where it is too long and may be shortened.

        Of those that leave half the context free the longest is taken, else the shortest.
        """
        context = self._model.plan.context
        tokens = self._form.prompts(messages)[0]
        if len(tokens) < context:
            return messages, tokens
        if self._shift:
            head = [m for m in messages[:1] if m["role"] == "system"]
            starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > len(head)]
            shorter = [[*head, *messages[i:]] for i in starts]
            prompts = self._form.prompts(*shorter) if shorter else []
            for candidate, fitting in zip(shorter, prompts, strict=True):
                if len(fitting) <= context // 2 or (candidate is shorter[-1] and len(fitting) < context):
                    return candidate, fitting
                tokens = fitting
        raise PromptError(
            f"the conversation has {len(tokens)} tokens, which leaves no room in the context of {context}: "
            "begin a new one, ask for less, or raise --context"
            + ("" if self._shift else ", or let it forget its oldest turns with --context-shift")
        )
