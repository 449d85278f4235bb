"""One quantised matrix of a checkpoint, whoever quantised it; and the parts it is made of, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Bytes, Checkpoint, Columns, Words
from flashinfer.errors import CheckpointError
from flashinfer.quant import bf16_to_f32

F32 = npt.NDArray[np.float32]


class Matrix(Protocol):
    """Weights `[out, in]`. Its methods read, and raise as `checkpoint.base.Source` does."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows (outputs) and columns (inputs); of several matrices, how many before that: their rows count on."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The checkpoint's tensors it is made of."""
        ...

    @property
    def scheme(self) -> str:
        """What it is, in words."""
        ...

    @property
    def codec(self) -> str | None:
        """The codec that holds scales and codes as they are; None where none does."""
        ...

    @property
    def nearest(self) -> str:
        """The codec its values are rounded to where the codes are not kept."""
        ...

    def encoded(self, start: int, stop: int) -> Bytes:
        """Rows `[start, stop)` in `codec`: `[stop - start, bytes]`."""
        ...

    def row_values(self, start: int, stop: int) -> F32:
        """What rows `[start, stop)` stand for."""
        ...

    def column_values(self, columns: Columns) -> F32:
        """What these columns stand for, in that order: `[out, columns]`."""
        ...


@dataclass(frozen=True)
class Parts:
    """The tensors of a checkpoint whose names begin with that of a module."""

    source: Checkpoint
    module: str

    def name(self, part: str) -> str:
        """The checkpoint's name of a part."""
        return f"{self.module}.{part}"

    def has(self, part: str) -> bool:
        """Whether it is there."""
        return self.name(part) in self.source.tensors

    def shape(self, part: str, dtypes: tuple[str, ...], sides: int) -> tuple[int, ...]:
        """Its shape. Raises CheckpointError: it is missing, of another type, or has not so many sides."""
        name = self.name(part)
        info = self.source.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"tensor {name} of {self.source.path} is missing, though the matrix is quantised; download it again"
            )
        if info.dtype not in dtypes or len(info.shape) != sides:
            raise CheckpointError(
                f"tensor {name} of {self.source.path} is {info.dtype} {list(info.shape)}, {' or '.join(dtypes)} with "
                f"{sides} sides was expected; download it again"
            )
        return info.shape

    def need(self, condition: bool, what: str) -> None:
        """Raise CheckpointError saying `what` of the module unless the condition holds."""
        if not condition:
            raise CheckpointError(
                f"{self.module} of {self.source.path} {what}: config.json and tensors do not belong together; "
                "download both again"
            )

    def vector(self, part: str) -> Words:
        """All of a vector."""
        words: Words = self.source.read_rows(self.name(part), 0, 1)[0]
        return words

    def finite(self, words: Words, part: str) -> F32:
        """Words of a part as float32. Raises CheckpointError where one is not finite."""
        dtype = self.source.tensors[self.name(part)].dtype
        values = bf16_to_f32(words.view("<u2")) if dtype == "bf16" else words.view("<f2" if dtype == "f16" else "<f4")
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"tensor {self.name(part)} of {self.source.path} holds NaN or infinity; the checkpoint is damaged: "
                "download it again"
            )
        return values.astype(np.float32)
