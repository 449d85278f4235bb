"""The text a model is calibrated or judged on: read and tokenised in pieces, as far as it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.errors import TextError
from flashinfer.text import Tokenizer
from flashinfer.units import KIB

Ids = npt.NDArray[np.int64]

PIECE = 256 * KIB
"""Bytes tokenised at once. Where two pieces meet, at the end of a line if there is one, tokens may differ from those of
the whole text; a text below this is tokenised whole."""


@dataclass(frozen=True)
class TextTokens:
    """The first tokens of a text, without BOS.

    ids: `[tokens]`. bytes, xxh3: how much was tokenised for them, and its XXH3-128 (32 hex digits).
    """

    ids: Ids
    xxh3: str
    bytes: int

    def about(self) -> dict[str, Any]:
        """How many tokens of which text, as plain values."""
        return {"tokens": len(self.ids), "bytes": self.bytes, "xxh3": self.xxh3}


def read_tokens(path: Path, tokenizer: Tokenizer, most: int, *, least: int = 1) -> TextTokens:
    """The first `most` tokens of a UTF-8 file, or all it has, if these are `least`; no more of it is read than that
    takes. Special tokens written out in it become their ids.

    Raises:
        TextError: it cannot be read, is empty, no UTF-8 (says where), or has fewer than `least` tokens.
    """
    found, have, size, digest = [], 0, 0, xxhash.xxh3_128()
    for data, text in _pieces(path):
        digest.update(data)
        size += len(data)
        found.append(np.array(tokenizer.encode(text, add_bos=False), dtype=np.int64))
        have += len(found[-1])
        if have >= most:
            break
    if have == 0:
        raise TextError(f"{path} is empty; give a file of UTF-8 text")
    if have < least:
        raise TextError(f"{path} has {have} tokens, a window takes {least}; give a longer text, or a smaller --context")
    return TextTokens(np.concatenate(found)[:most], digest.hexdigest(), size)


def split(ids: Ids, held_out: int) -> tuple[Ids, Ids]:
    """What to fit on, and the last `held_out` tokens, to judge by.

    Raises:
        TextError: that leaves nothing to fit on.
    """
    if not 0 <= held_out < len(ids):
        raise TextError(f"of {len(ids)} tokens, {held_out} cannot be held out; give a longer text")
    return ids[: len(ids) - held_out], ids[len(ids) - held_out :]


def _pieces(path: Path) -> Iterator[tuple[bytes, str]]:
    """The file from its start, in pieces of at most PIECE bytes, and what they say. Raises TextError."""
    offset, rest = 0, b""
    try:
        with path.open("rb") as file:
            while data := rest + file.read(PIECE - len(rest)):
                end = len(data) if len(data) < PIECE else _boundary(data)
                yield data[:end], data[:end].decode("utf-8")
                offset, rest = offset + end, data[end:]
    except UnicodeDecodeError as e:
        raise TextError(f"{path} is not UTF-8: byte {offset + e.start} ({e.reason}); convert it first") from e
    except OSError as e:
        raise TextError(f"cannot read {path}: {e.strerror or e}; give a file of UTF-8 text") from e


def _boundary(data: bytes) -> int:
    """Where to cut so that lines stay whole, else words (with the space before them), else at least characters."""
    if line := data.rfind(b"\n") + 1:
        return line
    if (word := data.rfind(b" ")) > 0:
        return word
    last = next((n for n in range(1, 5) if data[-n] & 0xC0 != 0x80), 1)
    return len(data) - last
