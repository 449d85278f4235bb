"""Checkpoints of DeepSeek-V3 as they were released: linear layers in fp8 with a scale for each block of a matrix
(arXiv 2412.19437, section 3.3.2).

`weight` `[out, in]` has the codes, e4m3; `weight_scale_inv` `[out / rows, in / columns]`, rounded up, is what a block
of `weight_block_size` of them is multiplied with, in float32. That others quantise activations, too, when they run such
a checkpoint (`activation_scheme`), is not followed: products here are with the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns, Words
from flashinfer.checkpoint.quantised.codecs import NEAREST_FP8
from flashinfer.checkpoint.quantised.matrix import F32, Matrix, Parts
from flashinfer.checkpoint.quantised.options import one_of
from flashinfer.errors import CheckpointError
from flashinfer.quant.fp8 import e4m3_values

SCALES = "weight_scale_inv"
_VALUES = e4m3_values()


def fp8_matrices(source: Checkpoint, options: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every quantised matrix by its name. Raises CheckpointError: options or tensors that cannot be followed."""
    one_of(source.path, options, "fmt", ("e4m3",), "e4m3")
    sides = options.get("weight_block_size")
    if not (isinstance(sides, list) and len(sides) == 2 and all(type(n) is int and n > 0 for n in sides)):
        raise CheckpointError(
            f"{source.path} is quantised with weight_block_size = {str(sides)[:80]}, two positive numbers were "
            "expected: only blocks are read; get another quantisation of the model, or the model as it was"
        )
    modules = [name.removesuffix(f".{SCALES}") for name in source.tensors if name.endswith(f".{SCALES}")]
    return {f"{m}.weight": _matrix(Parts(source, m), (sides[0], sides[1])) for m in modules}


@dataclass(frozen=True)
class Blocked:
    """See `matrix.Matrix`. `block`: rows and columns that share a scale."""

    parts_of: Parts
    shape: tuple[int, int]
    block: tuple[int, int]

    codec = None
    nearest = NEAREST_FP8

    @property
    def parts(self) -> tuple[str, ...]:
        """See `Matrix.parts`."""
        return self.parts_of.name("weight"), self.parts_of.name(SCALES)

    @property
    def scheme(self) -> str:
        """See `Matrix.scheme`."""
        return f"fp8, blocks of {self.block[0]} x {self.block[1]}"

    def encoded(self, start: int, stop: int) -> Bytes:
        """See `Matrix.encoded`: no codec has scales of blocks."""
        raise AssertionError("there is no codec")

    def row_values(self, start: int, stop: int) -> F32:
        """See `Matrix.row_values`."""
        codes = self.parts_of.source.read_rows(self.parts_of.name("weight"), start, stop)
        return self._values(codes, np.arange(start, stop), np.arange(self.shape[1]))

    def column_values(self, columns: Columns) -> F32:
        """See `Matrix.column_values`."""
        codes = self.parts_of.source.read_columns(self.parts_of.name("weight"), columns)
        return self._values(codes, np.arange(self.shape[0]), np.arange(self.shape[1])[columns])

    def _values(self, codes: Words, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> F32:
        """What codes at these rows and columns stand for. Raises CheckpointError where one is not a number."""
        values = _VALUES[codes]
        if np.isnan(values).any():
            raise CheckpointError(
                f"tensor {self.parts_of.name('weight')} of {self.parts_of.source.path} holds NaN; the checkpoint is "
                "damaged: download it again"
            )
        first, last = int(rows[0]) // self.block[0], int(rows[-1]) // self.block[0] + 1
        scales = self.parts_of.finite(self.parts_of.source.read_rows(self.parts_of.name(SCALES), first, last), SCALES)
        values *= scales[rows // self.block[0] - first][:, columns // self.block[1]]
        return values


def _matrix(parts: Parts, block: tuple[int, int]) -> Matrix:
    rows, columns = parts.shape("weight", ("F8_E4M3",), 2)
    scales = parts.shape(SCALES, ("f32",), 2)
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    parts.need(scales == wanted, f"has scales {list(scales)}; blocks of {list(block)} need {list(wanted)}")
    return Blocked(parts, (rows, columns), block)
