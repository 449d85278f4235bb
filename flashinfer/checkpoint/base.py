"""What a checkpoint is, whatever its source: names, shapes and types at once, bytes on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""Values as they lie in the file: one unsigned word each, 2 bytes (f16, bf16) or 4 (f32); or packed codes."""
Bytes = npt.NDArray[np.uint8]
Columns = slice | npt.NDArray[np.int64]
"""A run of columns (step 1), or their numbers."""


@dataclass(frozen=True)
class Coded:
    """How a matrix that comes quantised can be packed.

    scheme: what it is in the checkpoint, in words. codec: the one that holds its scales and codes as they are; None
    where none does. nearest: the one its values are rounded to where the codes are not kept. rows: of `codec`, encoded
    rows `[start, stop)`, `[stop - start, bytes]`; raises as a `Source` does.
    """

    scheme: str
    codec: str | None
    nearest: str
    rows: Callable[[int, int], Bytes]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    `dtype` is a codec's name (`f32`, `f16`, `bf16`), or the source's own name for a type that cannot be packed. Of a
    matrix that comes quantised it is that of the values its codes stand for, and `coded` says the rest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coded: Coded | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row, and several matrices are one below the other."""
        return math.prod(self.shape[:-1]), self.shape[-1]


class Source(Protocol):
    """Where tensors are read from. Reads are positional: memory is what the caller asked for, no more.

    All reading methods raise CheckpointError: unpackable dtype, a file cut short, an I/O error.
    """

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """Rows `[start, stop)` of a matrix (a vector is one row): `[stop - start, columns]`."""
        ...

    def read_columns(self, name: str, columns: Columns) -> Words:
        """The given columns of a matrix, in that order: `[rows, number of columns]`."""
        ...

    def will_need(self, name: str) -> None:
        """Hint that all of a tensor will be read soon. Changes no result."""
        ...

    def close(self) -> None:
        """Release the files. Idempotent."""
        ...


class Checkpoint(Source, Protocol):
    """A lazy mapping of names to tensors, whatever it is read from, and what else belongs to the model."""

    path: Path
    config: Mapping[str, Any]
    """The content of config.json, or what a file of another kind says, in its words."""
    text: Mapping[str, Path]
    """Tokenizer, generation and configuration files, by name: carried into the store byte for byte.

    What a source generates lies in a temporary folder until `close`."""
    tensors: Mapping[str, TensorInfo]
