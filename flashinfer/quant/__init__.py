"""Codecs: how values become bytes in a store. One file each, a table (`codec`), one form for most (`layout`)."""

from flashinfer.quant.codec import CODECS, GROUPED, PLAIN, Codec, codec_named, user_codec
from flashinfer.quant.grouped import Grouped
from flashinfer.quant.layout import Layout
from flashinfer.quant.llm_int8 import LlmInt8, codec_with
from flashinfer.quant.plain import bf16_to_f32, f32_to_bf16

__all__ = [
    "CODECS",
    "GROUPED",
    "PLAIN",
    "Codec",
    "Grouped",
    "Layout",
    "LlmInt8",
    "bf16_to_f32",
    "codec_named",
    "codec_with",
    "f32_to_bf16",
    "user_codec",
]
