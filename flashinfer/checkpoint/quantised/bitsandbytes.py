"""Four-bit checkpoints of bitsandbytes, as transformers saves them: `weight` and what it hangs on it.

`weight` `[n / 2, 1]` has the codes of the flattened matrix, two to a byte, the first in the high half;
`weight.quant_map` is the table of 16 values, and `weight.absmax` the scale of every `blocksize` values: float32, or
(double quantisation) codes of `weight.nested_quant_map`, `nested_blocksize` of which share one of
`weight.nested_absmax`, and to which `nested_offset` is added. `weight.quant_state.bitsandbytes__nf4` (or `__fp4`) is
the bytes of a JSON object that says the rest.

A value is the table's entry times its scale in float32, rounded once, as in `quant.nf4`; bitsandbytes rounds it once
more, to the type it computes in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns
from flashinfer.checkpoint.quantised.codecs import NEAREST_FLOATS
from flashinfer.checkpoint.quantised.matrix import F32, Matrix, Parts
from flashinfer.checkpoint.quantised.options import one_of
from flashinfer.quant import Grouped, codec_named
from flashinfer.quant.dynamic import TABLE as DYNAMIC
from flashinfer.quant.nested import GROUPS
from flashinfer.quant.nf4 import BLOCK, TABLE

STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


class State(msgspec.Struct, frozen=True):
    """What the JSON says: sizes of blocks in values, and of the second level in scales."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


def bitsandbytes_matrices(source: Checkpoint, options: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every quantised matrix by its name. Raises CheckpointError: options or tensors that cannot be followed."""
    one_of(source.path, options, "load_in_8bit", (False,), False)
    found: dict[str, Matrix] = {}
    for name in source.tensors:
        for state in STATES:
            if name.endswith(f".{state}"):
                parts = Parts(source, name.removesuffix(f".{state}"))
                found[parts.name("weight")] = _matrix(parts, state)
    return found


@dataclass(frozen=True)
class FourBits:
    """See `matrix.Matrix`."""

    parts_of: Parts
    state: State
    state_part: str

    @property
    def shape(self) -> tuple[int, int]:
        """See `Matrix.shape`."""
        return self.state.shape

    @property
    def parts(self) -> tuple[str, ...]:
        """See `Matrix.parts`."""
        names = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
        return tuple(self.parts_of.name(p) for p in (*(f"weight{n}" for n in names), self.state_part)
                     if self.parts_of.has(p))  # fmt: skip

    @property
    def scheme(self) -> str:
        """See `Matrix.scheme`."""
        nested = "" if self.state.nested_blocksize is None else ", double quantisation"
        return f"bitsandbytes {self.state.quant_type}, blocks of {self.state.blocksize}{nested}"

    @cached_property
    def codec(self) -> str | None:
        """See `Matrix.codec`: of `nf4` in blocks that end with the rows. The second level is kept, too, where it falls
        on rows."""
        columns, block = self.shape[1], self.state.blocksize
        if not np.array_equal(self._table, TABLE) or block % BLOCK or columns % block:
            return None
        blocks, second = columns // BLOCK, self.state.nested_blocksize
        aligned = GROUPS % blocks == 0 or blocks % GROUPS == 0
        same = block == BLOCK and second == GROUPS and aligned
        return "nf4" if same and np.array_equal(self._floats("weight.nested_quant_map"), DYNAMIC) else "nf4f32"

    @property
    def nearest(self) -> str:
        """See `Matrix.nearest`."""
        return NEAREST_FLOATS

    def encoded(self, start: int, stop: int) -> Bytes:
        """See `Matrix.encoded`."""
        assert self.codec is not None
        codec, (_, columns), rows = codec_named(self.codec), self.shape, stop - start
        assert isinstance(codec, Grouped)
        codes = self._codes(start * columns, stop * columns).reshape(rows, columns)
        if self.codec == "nf4":
            return codec.layout.rows(self._nested_rows(start, stop), codes)
        each = columns // self.state.blocksize
        scales = self._scales(start * each, stop * each).reshape(rows, each)
        spread = np.repeat(scales, self.state.blocksize // BLOCK, axis=1).astype("<f4", copy=False)
        return codec.layout.rows(spread.view(np.uint8), codes)

    def row_values(self, start: int, stop: int) -> F32:
        """See `Matrix.row_values`."""
        columns, block = self.shape[1], self.state.blocksize
        first, last = start * columns, stop * columns
        blocks = np.arange(first, last) // block
        scales = self._scales(first // block, -(-last // block))[blocks - first // block]
        values: F32 = (self._table[self._codes(first, last)] * scales).reshape(stop - start, columns)
        return values

    def column_values(self, columns: Columns) -> F32:
        """See `Matrix.column_values`."""
        rows, width = self.shape
        chosen = np.arange(width)[columns]
        first, last = int(chosen.min()), int(chosen.max()) + 1
        scales = self._scales(0, self._blocks)
        values = np.empty((rows, len(chosen)), np.float32)
        for row in range(rows):
            codes = self._codes(row * width + first, row * width + last)[chosen - first]
            values[row] = self._table[codes] * scales[(row * width + chosen) // self.state.blocksize]
        return values

    @property
    def _blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.state.blocksize)

    @cached_property
    def _table(self) -> F32:
        return self._floats("weight.quant_map")

    def _floats(self, part: str) -> F32:
        return self.parts_of.finite(self.parts_of.vector(part), part)

    def _codes(self, first: int, last: int) -> Bytes:
        """Codes of these values of the flattened matrix, one to a byte."""
        at = first // 2
        packed = self.parts_of.source.read_rows(self.parts_of.name("weight"), at, -(-last // 2)).astype(np.uint8)
        return np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1)[first - 2 * at : last - 2 * at]

    def _scales(self, first: int, last: int) -> F32:
        """Scales of these blocks."""
        if self.state.nested_blocksize is None:
            return self._floats("weight.absmax")[first:last]
        codes = self.parts_of.vector("weight.absmax")[first:last]
        largest = self._floats("weight.nested_absmax")[np.arange(first, last) // self.state.nested_blocksize]
        values: F32 = self._floats("weight.nested_quant_map")[codes] * largest + np.float32(self.state.nested_offset)
        return values

    def _nested_rows(self, start: int, stop: int) -> Bytes:
        """Both levels of scales of these rows, as `quant.nested` lays them out."""
        blocks = self.shape[1] // BLOCK
        codes = self.parts_of.vector("weight.absmax")[start * blocks : stop * blocks].reshape(stop - start, blocks)
        at = np.arange(start, stop)[:, None] * blocks // GROUPS + np.arange(-(-blocks // GROUPS))
        largest = self._floats("weight.nested_absmax")[at]
        mean = np.full((stop - start, 1), self.state.nested_offset, np.float32)
        floats = np.concatenate([mean, largest], axis=1).astype("<f4", copy=False)
        return np.concatenate([floats.view(np.uint8), codes.astype(np.uint8)], axis=1)


def _matrix(parts: Parts, state_part: str) -> Matrix:
    found = FourBits(parts, _state(parts, state_part), state_part)
    state, (rows, columns) = found.state, found.shape
    parts.need(
        rows > 0 and columns > 0 and state.blocksize > 0 and (state.nested_blocksize or 1) > 0,
        f"has blocks of {state.blocksize} in a matrix of {rows} x {columns}",
    )
    _check(parts, "weight", ("U8",), (-(-rows * columns // 2), 1))
    _check(parts, "weight.quant_map", ("f32",), (16,))
    blocks, second = found._blocks, state.nested_blocksize
    _check(parts, "weight.absmax", ("f32",) if second is None else ("U8",), (blocks,))
    if second is not None:
        _check(parts, "weight.nested_absmax", ("f32",), (-(-blocks // second),))
        _check(parts, "weight.nested_quant_map", ("f32",), (256,))
    return found


def _check(parts: Parts, part: str, dtypes: tuple[str, ...], wanted: tuple[int, ...]) -> None:
    shape = parts.shape(part, dtypes, len(wanted))
    parts.need(shape == wanted, f"has {part} of shape {list(shape)}, its quant_state needs {list(wanted)}")


def _state(parts: Parts, part: str) -> State:
    parts.shape(part, ("U8",), 1)
    raw = parts.vector(part).astype(np.uint8).tobytes()
    try:
        return msgspec.convert(json.loads(raw), State)
    except (ValueError, RecursionError, msgspec.ValidationError) as e:
        parts.need(False, f"has a quant_state that cannot be read ({str(e)[:120]})")
        raise AssertionError from e
