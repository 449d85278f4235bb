"""Matrices of integers with scales and zero-points: what GPTQ and AWQ checkpoints have in common.

A value is `(code - zero) * scale`, which float32 holds exactly: codes and zero-points have at most eight bits, scales
are float16 (or bfloat16 that float16 holds). Programs that dequantise to float16 round it once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Bytes, Columns, Words
from flashinfer.checkpoint.quantised.codecs import holding_integers, nearest_integers
from flashinfer.checkpoint.quantised.matrix import F32, Parts
from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError
from flashinfer.quant import Grouped, codec_named
from flashinfer.quant.int8g32 import int8g32_rows

Index = npt.NDArray[np.int64]
_STRIP = 64
"""Rows whose values are made together, so that little is needed beside codes and values."""


class Packing(Protocol):
    """How a scheme packs integers into words of 32 bits."""

    def codes_of_rows(self, parts: Parts, start: int, stop: int) -> Bytes:
        """Codes of rows `[start, stop)`: `[stop - start, in]`, one to a byte."""
        ...

    def codes_of_columns(self, parts: Parts, columns: Columns) -> Bytes:
        """Codes of these columns: `[out, columns]`, one to a byte."""
        ...

    def zeros(self, words: Words) -> Bytes:
        """Zero-points of words of `qzeros` `[groups, n]`: `[groups, n * codes of a word]`."""
        ...


@dataclass(frozen=True)
class Integers:
    """See `matrix.Matrix`. `group_of` is the group of each column; None where they lie in order."""

    parts_of: Parts
    packing: Packing
    shape: tuple[int, int]
    bits: int
    group: int
    method: str
    group_of: Index | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """See `Matrix.parts`."""
        return tuple(self.parts_of.name(p) for p in ("qweight", "qzeros", "scales", "g_idx") if self.parts_of.has(p))

    @property
    def scheme(self) -> str:
        """See `Matrix.scheme`."""
        groups = "one group a row" if self.group >= self.shape[1] else f"groups of {self.group}"
        return f"{self.method} {self.bits}-bit, {groups}{'' if self.group_of is None else ', act-order'}"

    @cached_property
    def codec(self) -> str | None:
        """See `Matrix.codec`. Reads all zero-points."""
        if self.group_of is not None:
            return None
        middle = 1 << (self.bits - 1)
        symmetric = all((zeros == middle).all() for zeros in self._all_zeros())
        return holding_integers(self.bits, -(-self.group // 128) * 128 if self._whole_row else self.group, symmetric)

    @property
    def nearest(self) -> str:
        """See `Matrix.nearest`."""
        return nearest_integers(self.bits, self.group)

    def encoded(self, start: int, stop: int) -> Bytes:
        """See `Matrix.encoded`."""
        assert self.codec is not None
        codec, columns = codec_named(self.codec), self.shape[1]
        codes = self.packing.codes_of_rows(self.parts_of, start, stop)
        held = codec.layout.group if isinstance(codec, Grouped) else 32
        assert held is not None
        groups = np.arange(0, columns, held) // self.group
        scales = self._halves(start, stop)[:, groups]
        if not isinstance(codec, Grouped):
            return int8g32_rows(scales, (codes ^ 128).view(np.int8))
        before = [np.ascontiguousarray(scales).view(np.uint8)]
        if codec.layout.zero:
            before.append(self._zeros(start, stop)[:, groups])
        return codec.layout.rows(np.concatenate(before, axis=1), codes)

    def row_values(self, start: int, stop: int) -> F32:
        """See `Matrix.row_values`."""
        codes = self.packing.codes_of_rows(self.parts_of, start, stop)
        return self._values(codes, self._groups(slice(None)), start, stop)

    def column_values(self, columns: Columns) -> F32:
        """See `Matrix.column_values`."""
        codes = self.packing.codes_of_columns(self.parts_of, columns)
        return self._values(codes, self._groups(columns), 0, self.shape[0])

    def _values(self, codes: Bytes, groups: Index, start: int, stop: int) -> F32:
        zeros, scales = self._zeros(start, stop), self._halves(start, stop).astype(np.float32)
        values = np.empty(codes.shape, np.float32)
        for i in range(0, len(codes), _STRIP):
            some = slice(i, i + _STRIP)
            np.subtract(codes[some], zeros[some][:, groups], out=values[some], dtype=np.float32)
            values[some] *= scales[some][:, groups]
        return values

    @property
    def _whole_row(self) -> bool:
        return self.group >= self.shape[1]

    def _groups(self, columns: Columns) -> Index:
        """The group of each of these columns."""
        found = np.arange(self.shape[1]) // self.group if self.group_of is None else self.group_of
        return found[columns]

    def _halves(self, start: int, stop: int) -> npt.NDArray[np.float16]:
        """Scales of rows `[start, stop)`: `[rows, groups]`. Raises CheckpointError: one is not finite, or bfloat16
        that float16 does not hold."""
        words = self.parts_of.source.read_columns(self.parts_of.name("scales"), slice(start, stop))
        scales = self.parts_of.finite(words, "scales").T
        with np.errstate(over="ignore"):
            halves = scales.astype("<f2")
        if not np.array_equal(halves.astype(np.float32), scales):
            raise CheckpointError(
                f"tensor {self.parts_of.name('scales')} holds a scale that float16 does not, which the codecs here "
                "need; get the checkpoint with float16 scales"
            )
        return halves

    def _zeros(self, start: int, stop: int) -> Bytes:
        """Zero-points of rows `[start, stop)`: `[rows, groups]`."""
        each = 32 // self.bits
        first = start // each
        words = self.parts_of.source.read_columns(self.parts_of.name("qzeros"), slice(first, -(-stop // each)))
        return self.packing.zeros(words)[:, start - first * each : stop - first * each].T

    def _all_zeros(self) -> Iterator[Bytes]:
        """All zero-points, some groups at a time."""
        name = self.parts_of.name("qzeros")
        groups, words = self.parts_of.source.tensors[name].matrix
        step = max(1, COPY_CHUNK // (32 * max(1, words)))
        for i in range(0, groups, step):
            yield self.packing.zeros(self.parts_of.source.read_rows(name, i, min(groups, i + step)))


def unpacked(words: Words, bits: int, order: tuple[int, ...] | None = None) -> Bytes:
    """Words of 32 bits `[..., n]` -> the integers in them `[..., n * 32 / bits]`, one to a byte, the lowest bits first.

    order: the place of each integer of a word among them; None: as they lie.
    """
    raw = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    found = raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], 2 * raw.shape[-1])
    if order is not None:
        found = found.reshape(-1, len(order))[:, np.argsort(order)].reshape(found.shape)
    return found


def check_integers(parts: Parts, shape: tuple[int, int], bits: int, group: int) -> None:
    """Hold `qzeros` and `scales` to the shape of the matrix. Raises CheckpointError."""
    out, groups = shape[0], -(-shape[1] // group)
    zeros = parts.shape("qzeros", ("I32",), 2)
    scales = parts.shape("scales", ("f16", "bf16"), 2)
    parts.need(
        scales == (groups, out),
        f"has scales {list(scales)}; {bits} bits in groups of {group} make it {out} x {shape[1]}, which needs "
        f"{[groups, out]}",
    )
    wanted = (groups, out * bits // 32)
    parts.need(
        out * bits % 32 == 0 and zeros == wanted, f"has zero-points {list(zeros)}, {bits} bits need {list(wanted)}"
    )
