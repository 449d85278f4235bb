"""Codecs as the kernels are told of them: by the facts of a `Layout`, never by a name.

How a product is made follows from the table (`native/codec.cpp`). Where it is a power of two times integers (`int8`,
`int4*`, `q4_0`, `mxfp4`), the activations are rounded to integers of 16 bits, 32 columns sharing a scale, and products
of integers are exact; each activation is off by at most 2^-16 of the largest of its 32. Else (`nf4`, `fp8`, `dynamic8`)
values are floats, as the activations are. Rows that are added to an output (`down`) are floats in any codec.
"""

from __future__ import annotations

from functools import cache

from flashinfer.native._kernels import Codec as NativeCodec
from flashinfer.quant import Codec, Grouped, Layout, LlmInt8, codec_named
from flashinfer.quant.dynamic import TABLE
from flashinfer.quant.int8 import INT8

TYPES = {"f32": 0, "f16": 1, "bf16": 2, "int8g32": 3}
SCALES = {"f16": 0, "f32": 1, "e8m0": 2, "nested": 3}
ZEROS = {None: 0, "f16": 1, "u8": 2}


def native_codec(codec: str | Codec) -> NativeCodec:
    """A codec, by its name in the manifest or as it is. Raises StoreError for a name nobody knows."""
    found = codec_named(codec) if isinstance(codec, str) else codec
    if isinstance(found, LlmInt8):
        return _of_layout(INT8.layout, found.outliers)
    return _of_layout(found.layout, ()) if isinstance(found, Grouped) else _plain(found.name)


@cache
def _plain(name: str) -> NativeCodec:
    return NativeCodec(TYPES[name])


@cache
def _of_layout(layout: Layout, outliers: tuple[int, ...]) -> NativeCodec:
    return NativeCodec.codes(
        layout.bits,
        layout.group or 0,
        layout.table.tolist(),
        SCALES[layout.scale],
        layout.unit,
        ZEROS[layout.zero],
        TABLE.tolist(),
        list(outliers),
    )
