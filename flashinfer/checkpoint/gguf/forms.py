"""How llama.cpp lays out a tensor that Hugging Face lays out otherwise, and the way back. Pure.

What is undone is what llama.cpp's convert_hf_to_gguf.py does to each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from flashinfer.layout.view import Index, in_halves


class Heads(NamedTuple):
    """How many heads of queries there are, and how many of keys (and values)."""

    queries: int
    keys: int


Order = Callable[[int, Heads], Index]
"""`order(rows, heads)`: which row of the file each row is. Raises ValueError: the heads do not divide the rows."""


@dataclass(frozen=True)
class Form:
    """What the file has done to a tensor: rows in another order, transposed (matrices), one more than it was (vectors),
    a vector made of a matrix of one row.

    At most one of them.
    """

    order: Order | None = None
    transposed: bool = False
    plus_one: bool = False
    one_row: bool = False


@cache
def queries_in_halves(rows: int, heads: Heads) -> Index:
    """Of each head, rotary pairs (x0, y0, x1, y1) become halves (x0, x1, y0, y1)."""
    return _halves(rows, heads.queries)


@cache
def keys_in_halves(rows: int, heads: Heads) -> Index:
    """As `queries_in_halves`."""
    return _halves(rows, heads.keys)


@cache
def head_by_head(rows: int, heads: Heads) -> Index:
    """All queries, all keys, all values become, for each head of keys: its queries, the key, the value."""
    count = heads.queries + 2 * heads.keys
    if rows % count or heads.queries % heads.keys:
        raise ValueError(f"{rows} rows, which {heads.queries} heads and {heads.keys} of keys do not divide")
    q, k, v = np.split(np.arange(rows).reshape(count, -1), [heads.queries, heads.queries + heads.keys])
    q = q.reshape(heads.keys, -1, q.shape[1])
    return np.concatenate([q, k[:, None], v[:, None]], axis=1).reshape(-1)


def extents(rows: Index) -> list[tuple[int, int]]:
    """`(start, stop)` of the pieces that hold these rows, ascending: with at most one other row between two of them."""
    if not len(rows):
        return []
    ordered = np.unique(rows)
    ends = np.flatnonzero(np.diff(ordered) > 2)
    starts, stops = ordered[np.concatenate([[0], ends + 1])], ordered[np.concatenate([ends, [-1]])] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _halves(rows: int, heads: int) -> Index:
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows, which {heads} heads do not divide into pairs")
    return in_halves(np.arange(rows), rows // heads, rows // heads)
