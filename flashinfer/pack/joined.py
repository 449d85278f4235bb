"""Matrices whose neurons lie in many tensors, or many matrices of one: some neurons at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from flashinfer.checkpoint import Checkpoint
from flashinfer.checkpoint.base import Bytes, Coded, Words
from flashinfer.config import COPY_CHUNK
from flashinfer.layout.view import Block, Joined


def read_joined(source: Checkpoint, view: Joined, start: int, stop: int) -> Words:
    """Neurons `[start, stop)` of the view: its rows, or its columns where neurons are these. Memory is what is asked
    for, and pieces of `COPY_CHUNK`."""
    read = _columns if view.columns else _rows
    parts: list[Any] = [read(source, *piece) for piece in _pieces(view, start, stop)]
    words: Words = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1 if view.columns else 0)
    return words


def joined_codes(source: Checkpoint, view: Joined) -> Coded | None:
    """How a view of matrices that come quantised can be packed; None where not all of them do. Their codes are kept
    where its rows are rows of theirs, and all of one codec."""
    found = [coded for name in view.names if (coded := source.tensors[name].coded) is not None]
    if len(found) < len(view.names):
        return None
    codecs = {coded.codec for coded in found}
    if view.columns or len(codecs) > 1 or any(block.transposed for block in view.blocks):
        return replace(found[0], codec=None)
    by_name = dict(zip(view.names, found, strict=True))

    def rows(start: int, stop: int) -> Bytes:
        parts = []
        for block, low, high in _pieces(view, start, stop):
            first, last = _span(block, low, high)
            parts.append(by_name[block.name].rows(block.first + first, block.first + last)[:: block.step])
        return np.concatenate(parts)

    return replace(found[0], rows=rows)


def _pieces(view: Joined, start: int, stop: int) -> Iterator[tuple[Block, int, int]]:
    """The blocks that neurons `[start, stop)` of the view lie in, each with which of its own these are."""
    first = 0
    for block, size in zip(view.blocks, view.sizes, strict=True):
        low, high = max(start - first, 0), min(stop - first, size)
        if low < high:
            yield block, low, high
        first += size


def _span(block: Block, low: int, high: int) -> tuple[int, int]:
    """From where to where rows `[low, high)` of a block lie, as it is turned."""
    return block.start + low * block.step, block.start + (high - 1) * block.step + 1


def _rows(source: Checkpoint, block: Block, low: int, high: int) -> Words:
    """Rows `[low, high)` of a block."""
    first, last = _span(block, low, high)
    if block.transposed:
        return _stored_columns(source, block, slice(first, last, block.step)).T.copy()
    return source.read_rows(block.name, block.first + first, block.first + last)[:: block.step]


def _columns(source: Checkpoint, block: Block, low: int, high: int) -> Words:
    """Columns `[low, high)` of a block."""
    taken = slice(block.start, block.start + (block.rows - 1) * block.step + 1, block.step)
    if block.transposed:
        return source.read_rows(block.name, block.first + low, block.first + high).T[taken].copy()
    if block.count == source.tensors[block.name].matrix[0]:
        return source.read_columns(block.name, slice(low, high))[taken]
    return _stored_columns(source, block, slice(low, high))[taken]


def _stored_columns(source: Checkpoint, block: Block, columns: slice) -> Words:
    """Some columns of the block as it is stored: its rows are read whole, a few at a time."""
    step = max(1, COPY_CHUNK // (4 * source.tensors[block.name].matrix[1]))
    end = block.first + block.count
    starts = range(block.first, end, step)
    pieces: list[Any] = [source.read_rows(block.name, r, min(end, r + step))[:, columns].copy() for r in starts]
    words: Words = np.concatenate(pieces)
    return words
