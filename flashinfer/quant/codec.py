"""The interface of a codec, and the table of those that exist."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreError
from flashinfer.quant.int8 import Int8
from flashinfer.quant.plain import BFloat16, Float16, Float32


class Codec(Protocol):
    """Rows of values <-> rows of bytes. A row's bytes depend on that row alone."""

    name: str

    def row_bytes(self, elements: int) -> int:
        """Bytes of one encoded row of `elements` values."""
        ...

    def encode(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """`[n, elements]` float32 -> `[n, row_bytes]` uint8. Raises OverflowError where a finite value
        does not fit the codec's range, or a codec of integers is given one that is not finite."""
        ...

    def decode(self, data: npt.NDArray[np.uint8], elements: int | None = None) -> npt.NDArray[np.float32]:
        """`[n, row_bytes]` uint8 -> `[n, elements]` float32. Without `elements` all values there are bytes for, which
        of a codec of blocks are whole blocks."""
        ...


CODECS: dict[str, Codec] = {c.name: c for c in (Float32(), Float16(), BFloat16(), Int8())}


def codec_named(name: str) -> Codec:
    """The codec of that name. Raises StoreError for a name this version does not know."""
    if name not in CODECS:
        raise StoreError(f"unknown codec {name!r}; this version knows {', '.join(CODECS)}; upgrade flashinfer-offload")
    return CODECS[name]
