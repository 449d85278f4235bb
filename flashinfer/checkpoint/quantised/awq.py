"""AWQ checkpoints as AutoAWQ writes them in its version GEMM: `qweight`, `qzeros` and `scales` of every linear layer.

A word of `qweight` `[in, out / 8]` has the codes of eight consecutive outputs, a word of `qzeros` `[groups, out / 8]`
their zero-points, as they are; from the lowest bits on they are outputs 0, 2, 4, 6, 1, 3, 5, 7 of the eight. `scales`
are `[groups, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns, Words
from flashinfer.checkpoint.quantised.integers import Integers, check_integers, unpacked
from flashinfer.checkpoint.quantised.matrix import Matrix, Parts
from flashinfer.checkpoint.quantised.options import group_size, one_of

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EACH = 8


def awq_matrices(source: Checkpoint, options: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every quantised matrix by its name. Raises CheckpointError: options or tensors that cannot be followed."""
    one_of(source.path, options, "bits", (4,))
    one_of(source.path, {"version": str(options.get("version", "gemm")).lower()}, "version", ("gemm",))
    group = group_size(source.path, options.get("group_size"))
    modules = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    return {f"{m}.weight": _matrix(Parts(source, m), group) for m in modules}


class _Packing:
    """See `integers.Packing`."""

    def codes_of_rows(self, parts: Parts, start: int, stop: int) -> Bytes:
        """See `Packing.codes_of_rows`."""
        first = start // EACH
        words = parts.source.read_columns(parts.name("qweight"), slice(first, -(-stop // EACH)))
        return unpacked(words, 4, ORDER)[:, start - first * EACH : stop - first * EACH].T

    def codes_of_columns(self, parts: Parts, columns: Columns) -> Bytes:
        """See `Packing.codes_of_columns`."""
        name, read = parts.name("qweight"), parts.source.read_rows
        if isinstance(columns, slice):
            first, last, _ = columns.indices(parts.source.tensors[name].matrix[0])
            words = read(name, first, last)
        else:
            words = np.concatenate([read(name, int(c), int(c) + 1) for c in columns])
        return unpacked(words, 4, ORDER).T

    def zeros(self, words: Words) -> Bytes:
        """See `Packing.zeros`."""
        return unpacked(words, 4, ORDER)


def _matrix(parts: Parts, group: int | None) -> Matrix:
    columns, words = parts.shape("qweight", ("I32",), 2)
    shape = (words * EACH, columns)
    size = columns if group is None else group
    check_integers(parts, shape, 4, size)
    return Integers(parts, _Packing(), shape, 4, size, "awq")
