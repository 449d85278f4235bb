"""Text from a stream of tokens, as early as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from flashinfer.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns tokens into text one at a time; mutable, one per stream.

    The pieces of `push`, then `flush`, concatenate to exactly `tokenizer.decode` of all tokens. With
    `after` (the prompt) they are its continuation: `decode(after) + pieces == decode(after + tokens)`,
    so that the space before the first generated word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """Text that is now complete; empty while `token` leaves a character unfinished."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, or nothing."""
        return self._utf8.decode(b"", final=True)
