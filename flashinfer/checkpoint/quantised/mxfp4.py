"""Checkpoints of gpt-oss as they were released: experts in MXFP4 (OCP Microscaling Formats 1.0), the rest in bfloat16.

`NAME_blocks` `[experts, out, in / 32, 16]` has the codes of 32 inputs, two to a byte, the first in the low half;
`NAME_scales` `[experts, out, in / 32]` is a byte for each, e8m0. Together they are the tensor `NAME.weight`
`[experts, out, in]`, whose values are those of the codec `mxfp4`; transformers dequantises them to its transpose, which
it calls `NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns
from flashinfer.checkpoint.quantised.codecs import NEAREST_MXFP4
from flashinfer.checkpoint.quantised.matrix import F32, Matrix, Parts
from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError
from flashinfer.quant.mxfp4 import BLOCK, MXFP4

_BLOCKS, _SCALES = "_blocks", "_scales"
_NAN = 255
"""The scale that stands for not a number."""


def mxfp4_matrices(source: Checkpoint, options: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every quantised tensor by its name. Raises CheckpointError: tensors that cannot be followed."""
    names = [name.removesuffix(_BLOCKS).rpartition(".") for name in source.tensors if name.endswith(_BLOCKS)]
    return {f"{module}.{name}.weight": _matrix(Parts(source, module), name) for module, _, name in names}


@dataclass(frozen=True)
class Microscaled:
    """See `matrix.Matrix`. Experts' matrices are one below the other."""

    parts_of: Parts
    tensor: str
    shape: tuple[int, int, int]

    codec = MXFP4.name
    nearest = NEAREST_MXFP4
    scheme = f"mxfp4, blocks of {BLOCK}"

    @property
    def parts(self) -> tuple[str, ...]:
        """See `Matrix.parts`."""
        return self.parts_of.name(self.tensor + _BLOCKS), self.parts_of.name(self.tensor + _SCALES)

    def encoded(self, start: int, stop: int) -> Bytes:
        """See `Matrix.encoded`. Raises CheckpointError also where a scale is not a number."""
        blocks, scales = self.parts
        read, each = self.parts_of.source.read_rows, self.shape[2] // BLOCK
        powers = read(scales, start, stop).astype(np.uint8)
        if (powers == _NAN).any():
            raise CheckpointError(
                f"tensor {scales} of {self.parts_of.source.path} holds NaN; the checkpoint is damaged: "
                "download it again"
            )
        packed = read(blocks, start * each, stop * each).astype(np.uint8)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, self.shape[2])
        return MXFP4.layout.rows(powers, codes)

    def row_values(self, start: int, stop: int) -> F32:
        """See `Matrix.row_values`."""
        return MXFP4.decode(self.encoded(start, stop), self.shape[2])

    def column_values(self, columns: Columns) -> F32:
        """See `Matrix.column_values`. Rows are read whole, some at a time."""
        rows, step = self.shape[0] * self.shape[1], max(1, COPY_CHUNK // (4 * self.shape[2]))
        return np.concatenate([self.row_values(i, min(rows, i + step))[:, columns] for i in range(0, rows, step)])


def _matrix(parts: Parts, name: str) -> Matrix:
    experts, out, groups, width = parts.shape(name + _BLOCKS, ("U8",), 4)
    scales = parts.shape(name + _SCALES, ("U8",), 3)
    parts.need(
        2 * width == BLOCK and scales == (experts, out, groups),
        f"has {name} in blocks {[experts, out, groups, width]} with scales {list(scales)}; 16 bytes a block and "
        f"{[experts, out, groups]} were expected",
    )
    return Microscaled(parts, name, (experts, out, groups * BLOCK))
