"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: `qweight`, `qzeros`, `scales`, `g_idx` of every linear layer.

A word of `qweight` `[in * bits / 32, out]` has the codes of consecutive inputs, a word of `qzeros`
`[groups, out * bits / 32]` the zero-points of consecutive outputs, the lowest bits first; `scales` are `[groups, out]`.
The format `gptq` stores zero-points less 1, modulo 2 ** bits; `gptq_v2` as they are. `g_idx` `[in]` is the group of
each input: with act-order (`desc_act`) columns were taken in falling order of importance, and a group's lie anywhere;
all zeros mean what no `g_idx` means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns, Words
from flashinfer.checkpoint.quantised.integers import Index, Integers, check_integers, unpacked
from flashinfer.checkpoint.quantised.matrix import Matrix, Parts
from flashinfer.checkpoint.quantised.options import group_size, one_of

FORMATS = ("gptq", "gptq_v2")


def gptq_matrices(source: Checkpoint, options: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every quantised matrix by its name. Raises CheckpointError: options or tensors that cannot be followed."""
    bits = one_of(source.path, options, "bits", (4, 8))
    form = one_of(source.path, options, "checkpoint_format", FORMATS, "gptq")
    one_of(source.path, options, "is_marlin_format", (False,), False)
    group = group_size(source.path, options.get("group_size"))
    modules = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    packing = _Packing(bits, 1 if form == "gptq" else 0)
    ordered = bool(options.get("desc_act"))
    return {f"{m}.weight": _matrix(Parts(source, m), packing, group, ordered) for m in modules}


@dataclass(frozen=True)
class _Packing:
    """See `integers.Packing`. `less`: what stored zero-points lack."""

    bits: int
    less: int

    def codes_of_rows(self, parts: Parts, start: int, stop: int) -> Bytes:
        """See `Packing.codes_of_rows`."""
        return self._codes(parts.source.read_columns(parts.name("qweight"), slice(start, stop)))

    def codes_of_columns(self, parts: Parts, columns: Columns) -> Bytes:
        """See `Packing.codes_of_columns`."""
        each, name = 32 // self.bits, parts.name("qweight")
        if isinstance(columns, slice):
            first, last, _ = columns.indices(parts.source.tensors[name].matrix[0] * each)
            words = parts.source.read_rows(name, first // each, -(-last // each))
            return self._codes(words)[:, first % each :][:, : last - first]
        words = np.concatenate([parts.source.read_rows(name, int(c) // each, int(c) // each + 1) for c in columns])
        shifts = (columns % each * self.bits).astype(np.uint32)
        return (words >> shifts[:, None] & np.uint32((1 << self.bits) - 1)).astype(np.uint8).T

    def zeros(self, words: Words) -> Bytes:
        """See `Packing.zeros`."""
        return unpacked(words, self.bits) + np.uint8(self.less) & np.uint8((1 << self.bits) - 1)

    def _codes(self, words: Words) -> Bytes:
        """Words `[n, rows]` -> codes `[rows, n * codes of a word]`."""
        return unpacked(np.ascontiguousarray(words.T, dtype=np.uint32), self.bits)


def _matrix(parts: Parts, packing: _Packing, group: int | None, ordered: bool) -> Matrix:
    rows, out = parts.shape("qweight", ("I32",), 2)
    shape = (out, rows * 32 // packing.bits)
    size = shape[1] if group is None else group
    check_integers(parts, shape, packing.bits, size)
    return Integers(parts, packing, shape, packing.bits, size, "gptq", _order(parts, shape[1], size, ordered))


def _order(parts: Parts, columns: int, group: int, ordered: bool) -> Index | None:
    """The group of each column, None where they lie in order. Raises CheckpointError for such as are not there."""
    if not ordered and not parts.has("g_idx"):
        return None
    (count,) = parts.shape("g_idx", ("I32",), 1)
    parts.need(count == columns, f"has a g_idx of {count} inputs, its qweight has {columns}")
    index = parts.vector("g_idx").astype(np.int64)
    parts.need(bool((index < -(-columns // group)).all()), f"has groups in g_idx that groups of {group} do not have")
    in_order = not index.any() or np.array_equal(index, np.arange(columns) // group)
    return None if in_order else index
