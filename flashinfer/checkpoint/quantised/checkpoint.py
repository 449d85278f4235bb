"""A checkpoint whose quantised matrices are tensors like any other: of float32, with their codes beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flashinfer.checkpoint.base import Checkpoint, Coded, Columns, TensorInfo, Words
from flashinfer.checkpoint.quantised.awq import awq_matrices
from flashinfer.checkpoint.quantised.bitsandbytes import bitsandbytes_matrices
from flashinfer.checkpoint.quantised.fp8 import fp8_matrices
from flashinfer.checkpoint.quantised.gptq import gptq_matrices
from flashinfer.checkpoint.quantised.matrix import Matrix
from flashinfer.checkpoint.quantised.mxfp4 import mxfp4_matrices
from flashinfer.errors import CheckpointError

KEY = "quantization_config"
"""What config.json of a quantised checkpoint has."""
METHODS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], dict[str, Matrix]]] = {
    "gptq": gptq_matrices,
    "awq": awq_matrices,
    "bitsandbytes": bitsandbytes_matrices,
    "mxfp4": mxfp4_matrices,
    "fp8": fp8_matrices,
}


def dequantising(source: Checkpoint) -> Checkpoint:
    """The checkpoint as it is, or one that has its quantised matrices under the names they would have unquantised.

    Raises:
        CheckpointError: a method or an option that is not known, named; parts that are missing or do not fit each
            other. The caller still owns `source`.
    """
    options = source.config.get(KEY)
    if options is None:
        return source
    if not isinstance(options, Mapping):
        raise CheckpointError(f"{source.path} has a {KEY} that is no object; download its config.json again")
    method = options.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in options else "")
    if method not in METHODS:
        raise CheckpointError(
            f"{source.path} is quantised by {str(method)[:80] or 'a method it does not name'}; read are "
            f"{', '.join(METHODS)} (awq and bitsandbytes in 4 bits, gptq also in 8): get one of those, or "
            "the model as it was"
        )
    matrices = METHODS[method](source, options)
    if not matrices:
        raise CheckpointError(
            f"{source.path} says it is quantised by {method}, and has no such tensors: config.json and tensors do not "
            "belong together; download both again"
        )
    return QuantisedCheckpoint(source, matrices)


class QuantisedCheckpoint:
    """See `Checkpoint`. Closing it closes the one it reads."""

    def __init__(self, source: Checkpoint, matrices: Mapping[str, Matrix]) -> None:
        self._source, self._matrices = source, matrices
        self.path, self.text = source.path, source.text
        self.config: Mapping[str, Any] = {k: v for k, v in source.config.items() if k != KEY}
        parts = {name for m in matrices.values() for name in m.parts}
        tensors = {name: info for name, info in source.tensors.items() if name not in parts}
        for name, m in matrices.items():
            if name in tensors:
                raise CheckpointError(f"{source.path} has {name} twice, quantised and not; download it again")
            tensors[name] = TensorInfo(name, "f32", m.shape, Coded(m.scheme, m.codec, m.nearest, m.encoded))
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        found = self._matrices.get(name)
        return self._source.read_rows(name, start, stop) if found is None else found.row_values(start, stop).view("<u4")

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        found = self._matrices.get(name)
        if found is None:
            return self._source.read_columns(name, columns)
        return found.column_values(columns).view("<u4")

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        found = self._matrices.get(name)
        for each in (name,) if found is None else found.parts:
            self._source.will_need(each)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._source.close()
