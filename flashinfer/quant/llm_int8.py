"""`llm.int8`: int8 rows with the outlier dimensions in float16 (LLM.int8(), arXiv 2208.07339, 3.2).

Outliers are input dimensions, so columns, the same for all rows of a matrix: those whose activations reach 6.0. They
are found on activations, not on weights, and belong to the tensor, not to its rows.

A row is a row of `int8` whose integers are 0 at the outliers, then for each outlier in ascending order its value, f16,
then zeros up to a multiple of 16 bytes. The scale is that of the other columns. A value is its integer times the
scale, at an outlier its float16. So a product is that of the int8 row, plus the outliers' products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from flashinfer.quant.codec import Codec, codec_named
from flashinfer.quant.grouped import pieces
from flashinfer.quant.int8 import INT8
from flashinfer.quant.layout import ALIGNMENT
from flashinfer.quant.plain import Float16

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


NAME = "llm.int8"


@dataclass(frozen=True)
class LlmInt8:
    """The codec of one tensor: `outliers` are its outlier columns, ascending. Raises ValueError where they are not."""

    outliers: tuple[int, ...]
    name = NAME

    def __post_init__(self) -> None:
        if any(a >= b for a, b in pairwise((-1, *self.outliers))):
            raise ValueError(f"outlier columns must be ascending and none negative, not {self.outliers}")

    def row_bytes(self, elements: int) -> int:
        """Those of int8, and two for each outlier, up to a multiple of 16."""
        return INT8.row_bytes(elements) + self._outlier_bytes()

    def encode(self, rows: F32) -> Bytes:
        """`[n, elements]` -> `[n, row_bytes]`. OverflowError for an outlier beyond 65504, or what is not finite."""
        out = np.zeros((len(rows), self.row_bytes(rows.shape[1])), dtype=np.uint8)
        for some in pieces(rows.shape):
            self._encode(rows[some], out[some])
        return out

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        """`[n, row_bytes]` -> `[n, elements]`; where `elements` is not given, the most that so many bytes can hold."""
        at = data.shape[1] - self._outlier_bytes()
        values = INT8.decode(data[:, :at], elements)
        values[:, self.outliers] = Float16().decode(data[:, at : at + 2 * len(self.outliers)])
        return values

    def _encode(self, rows: F32, out: Bytes) -> None:
        """Encode a few rows. Writes `out`, which is zeros."""
        at, found = INT8.row_bytes(rows.shape[1]), rows[:, self.outliers]
        if not np.isfinite(found).all():
            raise OverflowError(f"an outlier is infinite or no number, which {self.name} does not know; use f32")
        others = rows.copy()
        others[:, self.outliers] = 0
        out[:, :at] = INT8.encode(others)
        out[:, at : at + 2 * len(self.outliers)] = Float16().encode(found)

    def _outlier_bytes(self) -> int:
        return -(-2 * len(self.outliers) // ALIGNMENT) * ALIGNMENT


def codec_with(name: str, outliers: Iterable[int]) -> Codec:
    """The codec of that name; of `llm.int8` the one with these outlier columns, which others have none of.

    Raises:
        StoreError: a name this version does not know. ValueError: columns that are not ascending.
    """
    return LlmInt8(tuple(outliers)) if name == NAME else codec_named(name)
