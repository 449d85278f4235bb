"""A codec of codes: a layout, and the rule that chooses scales and codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.quant.layout import Layout

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

Quantise = Callable[[F32], tuple[Bytes, Bytes]]
"""Finite rows `[n, columns]` in whole groups -> the bytes before the codes `[n, scales and zero-points]`, and the codes
`[n, columns]`, one to a byte. A scale that its type cannot hold comes back infinite."""

_PIECE = 1 << 17
"""Values worked on at once (a row at least): what is needed beside input and output stays in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """A codec whose rows are as `layout` says; see there what a value is. Only finite values: else OverflowError."""

    name: str
    layout: Layout
    quantise: Quantise

    def row_bytes(self, elements: int) -> int:
        """Bytes of one encoded row of `elements` values."""
        return self.layout.row_bytes(elements)

    def encode(self, rows: F32) -> Bytes:
        """`[n, elements]` -> `[n, row_bytes]`. OverflowError for what is not finite, or needs an infinite scale."""
        out = np.zeros((len(rows), self.row_bytes(rows.shape[1])), dtype=np.uint8)
        for some in pieces(rows.shape):
            self._encode(rows[some], out[some])
        return out

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        """`[n, row_bytes]` -> `[n, elements]`; where `elements` is not given, the most that so many bytes can hold."""
        columns = self.layout.elements(data.shape[1]) if elements is None else elements
        out = np.empty((len(data), columns), dtype=np.float32)
        for some in pieces(out.shape):
            self._decode(data[some], out[some])
        return out

    def _encode(self, rows: F32, out: Bytes) -> None:
        """Encode a few rows. Writes `out`, which is zeros."""
        elements, layout = rows.shape[1], self.layout
        if not np.isfinite(rows).all():
            raise OverflowError(f"a value is infinite or no number, which {self.name} does not know; use f32")
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scales, codes = self.quantise(_whole(rows, layout.group))
        out[:, : scales.shape[1]] = scales
        finite = np.isfinite(layout.scales(out, elements)).all()
        if not finite or (layout.zero and not np.isfinite(layout.zeros(out, elements)).all()):
            raise OverflowError(f"a value lies beyond the range of {self.name}; use bf16 or f32")
        layout.write_codes(out, codes[:, :elements])

    def _decode(self, data: Bytes, out: F32) -> None:
        """Decode a few rows. Writes `out`."""
        elements, layout = out.shape[1], self.layout
        layout.table.take(layout.codes(data, elements), out=out, mode="clip")
        out *= spread(layout.scales(data, elements), layout.group, elements)
        if layout.zero:
            out += spread(layout.zeros(data, elements), layout.group, elements)


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows `[n, columns]` in turn, as many at once as a piece allows."""
    step = max(1, _PIECE // max(1, shape[1]))
    return (slice(i, i + step) for i in range(0, shape[0], step))


def spread(per_group: F32, group: int | None, columns: int) -> F32:
    """`[n, groups]` -> `[n, columns]`, or `[n, 1]` where the row is one group: what each column is scaled by."""
    return per_group if group is None else np.repeat(per_group, group, axis=1)[:, :columns]


def largest_of(rows: F32, group: int) -> F32:
    """The largest magnitude of each group: `[n, columns]` in whole groups -> `[n, groups]`."""
    return np.maximum.reduceat(np.abs(rows), range(0, rows.shape[1], group), axis=1)


def _whole(rows: F32, group: int | None) -> F32:
    """The rows, contiguous; the last group filled up with its last value, which changes nothing of it."""
    missing = 0 if group is None else -rows.shape[1] % group
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing)), mode="edge") if missing else rows)
