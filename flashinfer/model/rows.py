"""Which rows of a step's buffers are real tokens: tiles of prompt tokens are anchored to absolute positions."""

from __future__ import annotations

from dataclasses import dataclass

from flashinfer.config import TILE_TOKENS


@dataclass(frozen=True)
class Rows:
    """`count` tokens at positions start, start+1, ... lie in rows skip .. skip+count of `total` rows.

    Row r stands for position `first + r`. In decode there is one row; in prefill `first` and `total` are
    multiples of TILE_TOKENS, so a token meets the same place of the same tile however the prompt is cut.
    """

    start: int
    count: int
    first: int
    total: int

    @property
    def skip(self) -> int:
        """Padding rows before the first token."""
        return self.start - self.first

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.count


def decode_row(position: int) -> Rows:
    """The single row of a decode step."""
    return Rows(position, 1, position, 1)


def prefill_rows(start: int, count: int) -> Rows:
    """Rows of a prompt chunk, widened to whole tiles."""
    first = start // TILE_TOKENS * TILE_TOKENS
    last = -(-(start + count) // TILE_TOKENS) * TILE_TOKENS
    return Rows(start, count, first, last - first)
