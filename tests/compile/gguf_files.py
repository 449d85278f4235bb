"""GGUF files for tests: written by the `gguf` library from plain tensors, and forged byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from tests.plain_checkpoint import LLAMA, Tensors, fill, llama_shapes

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip
"""Hugging Face's names of llama's modules -> GGUF's, written down apart from the library's table."""

METADATA = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
"""GGUF's key, less `llama.` -> config.json's."""


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name


def interleave(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp's `permute` (convert_hf_to_gguf.py): rows of each head from halves to pairs."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def halves(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The way back."""
    shape = values.shape
    return values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """How many heads a tensor's rows are interleaved in, if they are."""
    if "q_proj" in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if "k_proj" in name else None


def encode(values: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[np.uint8]:
    """Bytes of that type: the nearest where the library can quantise, else blocks of about the values' size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (values.shape[0], values.shape[1] // block, block_bytes)
        data = np.random.default_rng(values.size).integers(0, 256, shape, dtype=np.uint8)
        scale = float(np.abs(values).mean())
        if kind == Type.Q4_K:  # d, the scale of scales, and dmin, that of the minima
            data[..., 0:4] = np.array([scale / 240, scale / 32], "<f2").view(np.uint8)
        else:
            assert kind == Type.Q6_K
            data[..., -2:] = np.array([scale / 1000], "<f2").view(np.uint8)
        return data.reshape(values.shape[0], -1)


def write_gguf(
    path: Path, config: Mapping[str, Any] = LLAMA, tensors: Tensors | None = None, kind: Type = Type.F32, **more: Any
) -> Tensors:
    """A llama as GGUF, matrices as `kind`; `more` metadata, with `__` for a dot. Returns the tensors it stands for."""
    tensors = fill(llama_shapes(dict(config))) if tensors is None else tensors
    writer = gguf.GGUFWriter(path, "llama")
    said = {f"llama.{key}": config[value] for key, value in METADATA.items()}
    said["llama.rope.dimension_count"] = config["hidden_size"] // config["num_attention_heads"]
    for key, value in (said | {key.replace("__", "."): value for key, value in more.items()}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    meant: Tensors = {}
    for name, values in tensors.items():
        heads = heads_of(name, config)
        stored = values if heads is None else interleave(values, heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), stored)
            meant[name] = values
            continue
        data = encode(np.ascontiguousarray(stored), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        back = gguf.quants.dequantize(data, kind)
        meant[name] = back if heads is None else halves(back, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def write_mixture(path: Path, architecture: str, change: Mapping[str, tuple[int, ...] | None]) -> None:
    """A mixture of five experts as GGUF: llama's attention; `change`: shapes of tensors that are other than they should
    be, None of those that are not there."""
    config = dict(LLAMA)
    hidden, size = config["hidden_size"], config["intermediate_size"]
    shapes = {gguf_name(name): shape for name, shape in llama_shapes(config).items() if ".mlp." not in name}
    for i in range(config["num_hidden_layers"]):
        shapes[f"blk.{i}.ffn_gate_inp.weight"] = (5, hidden)
        shapes |= {f"blk.{i}.ffn_{part}_exps.weight": (5, size, hidden) for part in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down_exps.weight"] = (5, hidden, size)
    writer = gguf.GGUFWriter(path, architecture)
    said = {key: config[value] for key, value in METADATA.items()} | {"expert_count": 5, "expert_used_count": 2}
    for key, value in said.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    for name, shape in {**shapes, **change}.items():
        if shape is not None:
            writer.add_tensor(name, np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def forged(
    path: Path, *entries: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, tail: int = 0
) -> Path:
    """A header of those bytes, whatever they say; `counts` of tensors and of entries, `tail` bytes of data."""
    said = counts or (len(tensors), len(entries))
    body = b"".join(entries) + b"".join(tensors)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *said) + body + bytes(tail))
    return path


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def described(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)
