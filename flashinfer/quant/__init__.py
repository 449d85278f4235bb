"""Codecs: how values become bytes in a store. One file each, one table of them (`codec`)."""

from flashinfer.quant.codec import CODECS, Codec, codec_named
from flashinfer.quant.plain import bf16_to_f32, f32_to_bf16

__all__ = ["CODECS", "Codec", "bf16_to_f32", "codec_named", "f32_to_bf16"]
