"""GPTQ (arXiv 2210.17323): rows rounded one after the other, the error of each taken over by those still to come.

A matrix M `[inputs, outputs]` multiplies X `[tokens, inputs]`. Rounding to Q should leave `|X M - X Q|` small, which is
tr(E^T H E) with E = M - Q and H = X^T X (twice that in the paper, which changes nothing). With H = U D U^T, U upper
triangular with ones on its diagonal, that is the sum over k of D_k |(U^T E)_k|^2, so row k is rounded not where it is
but where the errors of the rows before it push it:

    Q_k = round(M_k + sum over j < k of U_jk E_j)

That is GPTQ: it gives what the paper's Algorithm 1 gives with the Cholesky factor of the inverse of H (QuIP, arXiv
2307.13304, which calls this LDLQ and GPTQ OPTQ), without an inverse, in the memory of H itself. As in the paper 1 % of
H's mean diagonal is added to it, and errors from far rows come in blocks of 128. Rows with most in H come first, which
its authors' code calls `act-order`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flashinfer.quant import Codec, Grouped, Layout

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Round = Callable[[int, F32], F32]
"""Rounds row k, `[outputs]`: what it becomes."""

DAMPING = 0.01
"""Of the mean diagonal of H, added to all of it."""
BLOCK = 128
"""Rows that the errors of all earlier blocks reach at once."""
_STRIP = 256
"""Rows of H worked on at once while it is factorised."""


def damp(h: F32) -> None:
    """Add to the diagonal what the paper adds. Writes `h`."""
    diagonal = np.einsum("ii->i", h)
    diagonal += np.float32(DAMPING) * diagonal.mean(dtype=np.float64).astype(np.float32)


def factorise(h: F32) -> F32:
    """U, upper triangular with ones on its diagonal, of H = U D U^T. Writes `h` and returns it.

    A Cholesky factorisation from the last row to the first, in blocks, in place; what lies below the diagonal is of no
    meaning afterwards. Takes 4 * (256 + 256) bytes for each row beside `h`.

    Raises:
        np.linalg.LinAlgError: H is singular, beyond what damping helps.
    """
    n = len(h)
    for stop in range(n, 0, -_STRIP):
        first = max(0, stop - _STRIP)
        lower = np.linalg.cholesky(h[first:stop, first:stop][::-1, ::-1])
        corner = lower[::-1, ::-1]
        above = h[:first, first:stop] @ np.linalg.inv(corner).T
        for row in range(0, first, _STRIP):
            end = min(first, row + _STRIP)
            h[row:end, row:first] -= above[row:end] @ above[row:].T
        scale = np.reciprocal(np.diagonal(corner))
        h[first:stop, first:stop] = corner * scale
        h[:first, first:stop] = above * scale
    return h


def round_rows(m: F32, u: F32, rounded: Round) -> None:
    """Round all rows of `m` `[inputs, outputs]` in their order, as the module says; what is left of a row is its error.
    Writes `m`."""
    for first in range(0, len(m), BLOCK):
        block, inner = m[first : first + BLOCK], u[first : first + BLOCK, first : first + BLOCK]
        pushed = u[:first, first : first + len(block)].T @ m[:first]
        for k, row in enumerate(block):
            wanted = row + pushed[k] + inner[:k, k] @ block[:k]
            row -= rounded(first + k, wanted)


def falling(h: F32) -> Index:
    """The rows of H by falling diagonal; of equals the first one first."""
    return np.argsort(-np.diagonal(h), kind="stable")


class Columns:
    """Rounds a matrix `[outputs, inputs]` whose groups lie along its inputs: scales and zero-points are those of the
    matrix as it was (static groups), so that columns can be rounded in any order and lie as always."""

    def __init__(self, codec: Grouped, values: F32) -> None:
        """values: the matrix. Raises OverflowError where the codec cannot hold it."""
        self._layout = layout = codec.layout
        self.data = codec.encode(values)
        self._group = layout.group or values.shape[1]
        self._scales = np.ascontiguousarray(layout.scales(self.data, values.shape[1]).T)
        self._zeros = np.ascontiguousarray(layout.zeros(self.data, values.shape[1]).T) if layout.zero else None
        self._codes = np.empty((values.shape[1], len(values)), dtype=np.uint8)
        self._table = _Table(layout)

    def rounded(self, column: int, wanted: F32) -> F32:
        """What column `column` becomes."""
        group = column // self._group
        scale, zero = self._scales[group], None if self._zeros is None else self._zeros[group]
        above = wanted if zero is None else wanted - zero
        codes = self._table.nearest(above / _divisors(scale))
        self._codes[column] = codes
        values: F32 = self._layout.table[codes] * scale
        return values if zero is None else values + zero

    def encoded(self) -> Bytes:
        """The matrix, once all columns are rounded: `[outputs, bytes]`."""
        self._layout.write_codes(self.data, np.ascontiguousarray(self._codes.T))
        return self.data


class Rows:
    """Rounds a matrix `[inputs, outputs]` whose groups lie along its outputs, as those of neurons do: a row is encoded
    as always, its scales with it."""

    def __init__(self, codec: Codec, values: F32) -> None:
        self._codec = codec
        self.data = np.empty((len(values), codec.row_bytes(values.shape[1])), dtype=np.uint8)

    def rounded(self, row: int, wanted: F32) -> F32:
        """What row `row` becomes."""
        self.data[row] = self._codec.encode(wanted[None])[0]
        values: F32 = self._codec.decode(self.data[row : row + 1], len(wanted))[0]
        return values

    def encoded(self) -> Bytes:
        """The matrix, once all rows are rounded: `[inputs, bytes]`."""
        return self.data


class _Table:
    """The codes of a layout by their values."""

    def __init__(self, layout: Layout) -> None:
        known = np.flatnonzero(np.isfinite(layout.table))
        self._codes = known[np.argsort(layout.table[known], kind="stable")].astype(np.uint8)
        values = layout.table[self._codes]
        self._middles = (values[1:] + values[:-1]) / np.float32(2)

    def nearest(self, values: F32) -> Bytes:
        """The code whose value is nearest; of two as near, the lower one."""
        return self._codes[np.searchsorted(self._middles, values)]


def _divisors(scales: F32) -> F32:
    """The scales, 1 in place of 0, where all values are the same."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)
