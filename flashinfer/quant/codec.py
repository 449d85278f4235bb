"""The interface of a codec, and the table of those that exist."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreError
from flashinfer.quant.dynamic8 import DYNAMIC8
from flashinfer.quant.fp8 import FP8
from flashinfer.quant.int4 import INT4
from flashinfer.quant.int8 import INT8
from flashinfer.quant.int8g32 import Int8g32
from flashinfer.quant.mxfp4 import MXFP4
from flashinfer.quant.nf4 import NF4, NF4F32
from flashinfer.quant.plain import BFloat16, Float16, Float32
from flashinfer.quant.q4_0 import Q4_0


class Codec(Protocol):
    """Rows of values <-> rows of bytes. A row's bytes depend on that row alone."""

    @property
    def name(self) -> str:
        """What a manifest calls it."""
        ...

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


PLAIN: tuple[Codec, ...] = (Float32(), Float16(), BFloat16())
"""Codecs whose bytes are the values themselves."""
GROUPED = (INT8, DYNAMIC8, FP8, *INT4, Q4_0, NF4, NF4F32, MXFP4)
"""Codecs whose rows are as their `layout` says."""
CODECS: dict[str, Codec] = {c.name: c for c in (*PLAIN, Int8g32(), *GROUPED)}
"""Every codec whose name says all. `LlmInt8`, which must be told a tensor's outliers, is not among them."""
ALIASES = {"int4": "int4g64"}
"""What a user may call a codec; a manifest has its full name."""


def codec_named(name: str) -> Codec:
    """The codec of that name. Raises StoreError for a name this version does not know."""
    if name not in CODECS:
        raise StoreError(f"unknown codec {name!r}; this version knows {', '.join(CODECS)}; upgrade flashinfer-offload")
    return CODECS[name]


def user_codec(name: str) -> Codec:
    """The codec a user means by `name`. Raises ValueError, with the names there are, where there is none."""
    full = ALIASES.get(name, name)
    if full not in CODECS:
        raise ValueError(f"codec {name!r} is not known; choose one of {', '.join([*CODECS, *ALIASES])}")
    return CODECS[full]
