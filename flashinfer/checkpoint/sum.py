"""A checkpoint plus something: each value is the sum in float32, rounded to the type the checkpoint has it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Checkpoint, Columns, Source, TensorInfo, Words
from flashinfer.checkpoint.raw import PACKABLE
from flashinfer.errors import CheckpointError
from flashinfer.quant import codec_named

Floats = npt.NDArray[np.float32]
Piece = Callable[[int, int], Floats]
"""`piece(i, j)`: rows `[i, j)` of a block, in float32."""
_STRIP = 1 << 18
"""Values added together: small enough to stay in the processor's cache, and all the memory a sum takes."""


class Addend(Protocol):
    """What is added to one matrix (a vector is one row), block by block. Its methods raise CheckpointError."""

    def rows(self, start: int, stop: int) -> Piece:
        """The block of rows `[start, stop)`."""
        ...

    def columns(self, columns: Columns) -> Piece:
        """The block of the given columns, in that order."""
        ...


class SumCheckpoint:
    """`base` with `addends` added and some tensors replaced. See `Checkpoint`."""

    def __init__(
        self,
        base: Checkpoint,
        other: Source,
        *,
        addends: Mapping[str, Addend],
        replaced: Mapping[str, TensorInfo] | None = None,
        config: Mapping[str, Any] | None = None,
        text: Mapping[str, Path] | None = None,
    ) -> None:
        """Both sources belong to it from now on, and are closed with it.

        Args:
            base: the checkpoint.
            other: what the addends and the replaced tensors are read from.
            addends: by the name of the tensor they are added to.
            replaced: name in `base` -> the tensor of `other` that takes its place (before its addend, if any).
            config: None is that of `base`.
            text: None is that of `base`.
        """
        self.path = base.path
        self.config = base.config if config is None else config
        self.text = base.text if text is None else text
        self._base, self._other, self._addends = base, other, addends
        self._replaced = replaced or {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, self._replaced.get(name, info).dtype, info.shape)
            for name, info in base.tensors.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        source, theirs = self._home(name)
        words = source.read_rows(theirs, start, stop)
        return self._added(name, words, self._addends[name].rows(start, stop)) if name in self._addends else words

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        source, theirs = self._home(name)
        words = source.read_columns(theirs, columns)
        return self._added(name, words, self._addends[name].columns(columns)) if name in self._addends else words

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        source, theirs = self._home(name)
        source.will_need(theirs)

    def close(self) -> None:
        """Close both sources."""
        self._base.close()
        self._other.close()

    def _home(self, name: str) -> tuple[Source, str]:
        return (self._other, self._replaced[name].name) if name in self._replaced else (self._base, name)

    def _added(self, name: str, words: Words, piece: Piece) -> Words:
        """`words` plus the block, in place."""
        codec = codec_named(self.tensors[name].dtype)
        step = max(1, _STRIP // max(1, words.shape[1]))
        for i in range(0, len(words), step):
            j = min(len(words), i + step)
            values = codec.decode(words[i:j].view(np.uint8)) + piece(i, j)
            try:
                words[i:j] = codec.encode(values).view(words.dtype)
            except OverflowError as e:
                raise CheckpointError(
                    f"tensor {name} of {self.path} does not fit {codec.name} with what is added to it: {e}"
                ) from e
        return words


def floats(words: Words, dtype: str) -> Floats:
    """Words of `dtype` as float32, same shape."""
    return codec_named(dtype).decode(words.view(np.uint8))


def need_packable(info: TensorInfo, where: Path) -> None:
    """Raise CheckpointError for a tensor of a type that cannot be added."""
    if info.dtype not in PACKABLE:
        raise CheckpointError(f"tensor {info.name} of {where} is {info.dtype}; F32, F16 and BF16 can be added")
