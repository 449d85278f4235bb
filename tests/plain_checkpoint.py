"""Checkpoints made of plain arithmetic: no torch, no random numbers, the same bytes on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.quant import codec_named

SAFETENSORS_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 20, "hidden_size": 16, "intermediate_size": 21,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "hidden_act": "relu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"], "vocab_size": 20, "hidden_size": 16, "word_embed_proj_dim": 8,
    "ffn_dim": 21, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
    "activation_function": "relu", "do_layer_norm_before": True,
}  # fmt: skip

Tensors = dict[str, npt.NDArray[np.float32]]


def llama_shapes(c: dict[str, Any] = LLAMA) -> dict[str, tuple[int, ...]]:
    hidden, ffn, head = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        for n, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{at}self_attn.{n}_proj.weight"] = (out, hidden)
        shapes |= {f"{at}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, ffn)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (c["vocab_size"], hidden)}


def opt_shapes(c: dict[str, Any] = OPT) -> dict[str, tuple[int, ...]]:
    hidden, ffn, embed = c["hidden_size"], c["ffn_dim"], c["word_embed_proj_dim"]
    at = "model.decoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}embed_tokens.weight": (c["vocab_size"], embed),
        f"{at}embed_positions.weight": (c["max_position_embeddings"] + 2, hidden),
        f"{at}project_in.weight": (hidden, embed),
        f"{at}project_out.weight": (embed, hidden),
    }
    norms = ["final_layer_norm"]
    for i in range(c["num_hidden_layers"]):
        matrices = {f"self_attn.{n}_proj": (hidden, hidden) for n in ("q", "k", "v", "out")}
        for n, shape in (matrices | {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}).items():
            shapes |= {f"{at}layers.{i}.{n}.weight": shape, f"{at}layers.{i}.{n}.bias": shape[:1]}
        norms += [f"layers.{i}.self_attn_layer_norm", f"layers.{i}.final_layer_norm"]
    for norm in norms:
        shapes |= {f"{at}{norm}.{part}": (hidden,) for part in ("weight", "bias")}
    return shapes


def fill(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Multiples of 1/128 below 1 in size, exact in every codec and different in every tensor."""
    tensors = {}
    for k, (name, shape) in enumerate(shapes.items()):
        n = np.arange(int(np.prod(shape)), dtype=np.int64)
        tensors[name] = (((n * 37 + k * 11) % 251 - 125) / 128).astype(np.float32).reshape(shape)
    return tensors


def save(path: Path, tensors: Tensors, dtypes: str | dict[str, str] = "f32") -> None:
    """One safetensors file; `dtypes` is a codec name for all, or per tensor."""
    table, data = {}, b""
    for name, values in tensors.items():
        dtype = dtypes if isinstance(dtypes, str) else dtypes.get(name, "f32")
        encoded = codec_named(dtype).encode(values.reshape(1, -1)).tobytes()
        offsets = [len(data), len(data) + len(encoded)]
        table[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": list(values.shape), "data_offsets": offsets}
        data += encoded
    save_raw(path, table, data)


def save_raw(path: Path, table: Any, data: bytes) -> None:
    """A safetensors file with whatever header."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_checkpoint(
    path: Path,
    config: dict[str, Any] = LLAMA,
    tensors: Tensors | None = None,
    dtypes: str | dict[str, str] = "f32",
) -> Path:
    """A whole checkpoint directory; the tensors are the filled ones of the config unless given."""
    path.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        shapes = llama_shapes if config["architectures"] == ["LlamaForCausalLM"] else opt_shapes
        tensors = fill(shapes(config))
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    save(path / "model.safetensors", tensors, dtypes)
    return path
