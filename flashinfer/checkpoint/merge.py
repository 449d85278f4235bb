"""A checkpoint with a LoRA adapter merged into it, block by block as it is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flashinfer.checkpoint.adapter import Adapter, LowRank
from flashinfer.checkpoint.base import Checkpoint, Columns, TensorInfo
from flashinfer.checkpoint.raw import RawFile
from flashinfer.checkpoint.sum import Addend, Floats, Piece, SumCheckpoint, floats, need_packable
from flashinfer.errors import CheckpointError

_SHARED = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")


def merge_adapter(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint whose matrices are `W + scale * B A`, in float32, rounded to the type of W.

    Tensors that the adapter carries whole (biases, `modules_to_save`) take the place of the base's, in their own
    type. Config, tokenizer and other text files are the base's.

    Raises:
        CheckpointError: the adapter was made for another model. The caller still owns both. Reading: also an
            adapter with NaN or infinity.
    """
    names = {name: _find(base, adapter, name) for name in (*adapter.low_rank, *adapter.saved)}
    if base.config.get("tie_word_embeddings", "lm_head.weight" not in base.tensors):
        for name in names:
            if name.removesuffix(".weight").rpartition(".")[2] in _SHARED:
                raise CheckpointError(
                    f"{adapter.path} changes {name}, and in {base.path} head and embedding are one: "
                    "merge it with peft and pack that"
                )
    for name, change in adapter.low_rank.items():
        _check(base, adapter, names[name], change.shape, change.a, change.b)
    for name, info in adapter.saved.items():
        _check(base, adapter, names[name], info.shape, info)
    addends: Mapping[str, Addend] = {names[n]: _Product(adapter.file, c) for n, c in adapter.low_rank.items()}
    replaced = {names[n]: info for n, info in adapter.saved.items()}
    return SumCheckpoint(base, adapter.file, addends=addends, replaced=replaced)


def _find(base: Checkpoint, adapter: Adapter, name: str) -> str:
    """The base's name for it; older checkpoints lack the first `model.`."""
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in base.tensors:
            return candidate
    raise CheckpointError(f"{adapter.path} changes {name[:200]}, which {base.path} has not: it is for another model")


def _check(base: Checkpoint, adapter: Adapter, name: str, shape: tuple[int, ...], *parts: TensorInfo) -> None:
    need_packable(base.tensors[name], base.path)
    for part in parts:
        need_packable(part, adapter.path)
    if shape != base.tensors[name].shape:
        raise CheckpointError(
            f"{adapter.path} is for a tensor {name} of shape {list(shape)}, {base.path} has it of "
            f"{list(base.tensors[name].shape)}: it is for another model"
        )


class _Product:
    """`scale * B A` of one matrix as an `Addend`; what a block needs of A and B is read for that block."""

    def __init__(self, file: RawFile, change: LowRank) -> None:
        self._file, self._change = file, change

    def rows(self, start: int, stop: int) -> Piece:
        """See `Addend.rows`."""
        c = self._change
        if c.transposed:
            return self._piece(self._columns(c.a, slice(start, stop)).T, self._rows(c.b, 0, c.b.shape[0]).T)
        return self._piece(self._rows(c.b, start, stop), self._rows(c.a, 0, c.a.shape[0]))

    def columns(self, columns: Columns) -> Piece:
        """See `Addend.columns`."""
        c = self._change
        left, right = self._rows(c.a, 0, c.a.shape[0]), self._rows(c.b, 0, c.b.shape[0])
        if c.transposed:
            return self._piece(left.T, right[columns].T)
        return self._piece(right, left[:, columns])

    def _piece(self, left: Floats, right: Floats) -> Piece:
        scaled = np.multiply(left, self._change.scale, dtype=np.float32)

        def piece(i: int, j: int) -> Floats:
            product: Floats = scaled[i:j] @ right
            return product

        return piece

    def _rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        return self._finite(info, floats(self._file.read_rows(info.name, start, stop), info.dtype))

    def _columns(self, info: TensorInfo, columns: slice) -> Floats:
        return self._finite(info, floats(self._file.read_columns(info.name, columns), info.dtype))

    def _finite(self, info: TensorInfo, values: Floats) -> Floats:
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {info.name} of {self._file.path} holds NaN or infinity; get it again")
        return values
