"""A tiny model of each architecture as GGUF: made by transformers, written as llama.cpp's converter writes it.

What the converter does to names, rows and values is written down here once more, in its own way (by reshapes, from
Hugging Face to GGUF), apart from the tables and orders under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from gguf import GGMLQuantizationType as Type

from tests.compile.gguf_files import encode

Array = npt.NDArray[Any]
CONTEXT = 96
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
"""Rows that blocks of 256 divide."""
GPT: dict[str, Any] = {
    "vocab_size": 40, "n_embd": 256, "n_inner": 512, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
METADATA = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size",
}  # fmt: skip
"""GGUF's key, less the architecture -> config.json's."""
GPT_METADATA = {
    "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer", "vocab_size": "vocab_size",
    "feed_forward_length": "n_inner", "attention.head_count": "n_head",
}  # fmt: skip
EPS, RMS_EPS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"

LLAMA_NAMES = {
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
PHI_NAMES = {
    "model.final_layernorm": "output_norm", "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}  # fmt: skip
PHI3_NAMES = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
OLMO2_NAMES = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
STARCODER2_NAMES = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
GPT2_NAMES = {
    "transformer.h": "blk", "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "ln_1": "attn_norm",
    "transformer.ln_f": "output_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "lm_head": "output",
}  # fmt: skip
NEOX_NAMES = {
    "gpt_neox.layers": "blk", "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One file: `general.architecture`, the model, and what llama.cpp's converter says and does of it.

    `keys`: GGUF's keys beside `METADATA` -> config.json's key, or the value itself where it is no string.
    `changes`: part of a tensor's name -> what is done to its values; the first that fits counts.
    """

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    changes: dict[str, Callable[[Array, Mapping[str, Any]], Array]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)


def pairs(values: Array, heads: int) -> Array:
    """llama.cpp's `permute`: rows of each head from halves to pairs."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def apart(values: Array, config: Mapping[str, Any]) -> Array:
    """q, k and v of each head, one after the other, to all of q, all of k, all of v."""
    shape = values.shape
    parted = values.reshape(config["num_attention_heads"], 3, -1, *shape[1:])
    return parted.swapaxes(0, 1).reshape(shape)


def turned(values: Array, _: Mapping[str, Any]) -> Array:
    return np.ascontiguousarray(values.T)


def one_more(values: Array, _: Mapping[str, Any]) -> Array:
    return values + np.float32(1)


PAIRS = {
    "q_proj": lambda values, config: pairs(values, config["num_attention_heads"]),
    "k_proj": lambda values, config: pairs(values, config["num_key_value_heads"]),
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
ROPE = {"rope.freq_base": 10000.0}
WHOLE = ROPE | {"rope.dimension_count": 64}
PART = ROPE | {"rope.dimension_count": 24}
LONG = [1.0 + 0.1 * i for i in range(32)]
SHORT = [1.0 + 0.01 * i for i in range(32)]


def part(**config: Any) -> dict[str, Any]:
    """Of heads of 64 values, 24 are turned."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.375}
    return SIZES | {"rope_parameters": rope} | config


def same_heads(**config: Any) -> dict[str, Any]:
    """As `part`, for a family that knows no groups."""
    return {key: value for key, value in part(**config).items() if key != "num_key_value_heads"}


CASES: dict[str, Case] = {
    "llama": Case("llama", "llama", SIZES, {RMS_EPS: "rms_norm_eps"} | WHOLE, changes=PAIRS),
    "llama-biases": Case("llama", "llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
                         {RMS_EPS: "rms_norm_eps", "attention.key_length": 32, "attention.value_length": 32,
                          "rope.dimension_count": 32} | ROPE, changes=PAIRS),
    "arcee": Case("arcee", "arcee", SIZES, {RMS_EPS: "rms_norm_eps"} | WHOLE, changes=PAIRS),
    "smollm3": Case("smollm3", "smollm3", SIZES | {"num_hidden_layers": 4}, {RMS_EPS: "rms_norm_eps",
                    "rope.freq_base": 2000000.0, "rope.dimension_count": 64}, changes=PAIRS),
    "granite": Case(
        "granite", "granite",
        SIZES | {"embedding_multiplier": 12.0, "logits_scaling": 7.0, "residual_multiplier": 0.22,
                 "attention_multiplier": 0.15},
        WHOLE | {RMS_EPS: "rms_norm_eps", "attention.scale": 0.15, "embedding_scale": 12.0, "residual_scale": 0.22,
                 "logit_scale": 7.0},
        changes=PAIRS,
    ),
    "qwen2": Case("qwen2", "qwen2", SIZES | {"tie_word_embeddings": True}, {RMS_EPS: "rms_norm_eps"} | ROPE),
    "qwen2-yarn": Case(
        "qwen2", "qwen2",
        SIZES | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                     "original_max_position_embeddings": 24}},
        ROPE | {RMS_EPS: "rms_norm_eps", "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 24},
    ),
    "qwen3": Case("qwen3", "qwen3", SIZES | {"head_dim": 32}, {RMS_EPS: "rms_norm_eps", "attention.key_length": 32,
                  "attention.value_length": 32} | ROPE),
    "olmo2": Case("olmo2", "olmo2", SIZES, {RMS_EPS: "rms_norm_eps"} | ROPE, LLAMA_NAMES | OLMO2_NAMES),
    "command-r": Case("command-r", "cohere", SIZES | THETA | {"logit_scale": 0.25}, ROPE | {EPS: "layer_norm_eps",
                      "logit_scale": 0.25, "rope.scaling.type": "none"}),
    "command-r-plus": Case("command-r", "cohere", SIZES | THETA | {"use_qk_norm": True, "logit_scale": 1.0},
                           {EPS: "layer_norm_eps", "logit_scale": 1.0, "rope.scaling.type": "none"} | ROPE),
    "nemotron": Case("nemotron", "nemotron", part(), {EPS: "norm_eps"} | PART, LLAMA_NAMES,
                     {"norm.weight": one_more}),
    "phi2": Case("phi2", "phi", part(num_key_value_heads=4), {EPS: "layer_norm_eps"} | PART,
                 LLAMA_NAMES | PHI_NAMES),
    "phi3": Case("phi3", "phi3", SIZES | {"sliding_window": 80}, WHOLE | {RMS_EPS: "rms_norm_eps",
                 "attention.sliding_window": "sliding_window", "rope.scaling.original_context_length": CONTEXT},
                 LLAMA_NAMES | PHI3_NAMES),
    "phi3-long": Case(
        "phi3", "phi3",
        SIZES | {"original_max_position_embeddings": 32, "sliding_window": None,
                 "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT,
                                     "long_factor": LONG}},
        WHOLE | {RMS_EPS: "rms_norm_eps", "attention.sliding_window": 0, "rope.scaling.original_context_length": 32,
                 "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(3.0) / np.log(32.0)))},
        LLAMA_NAMES | PHI3_NAMES,
        tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
    ),
    "starcoder2": Case("starcoder2", "starcoder2", SIZES | {"sliding_window": 4096}, {EPS: "norm_epsilon"} | ROPE,
                       LLAMA_NAMES | STARCODER2_NAMES),
    "stablelm": Case("stablelm", "stablelm", part(use_qkv_bias=True), {EPS: "layer_norm_eps",
                     "use_parallel_residual": True} | PART),
    "stablelm-12b": Case("stablelm", "stablelm", part(use_parallel_residual=True, qk_layernorm=True),
                         {EPS: "layer_norm_eps", "use_parallel_residual": True} | PART),
    "gptneox": Case("gptneox", "gpt_neox", same_heads(), {EPS: "layer_norm_eps", "use_parallel_residual": True}
                    | PART, NEOX_NAMES, {"query_key_value": apart}),
    "gptneox-in-turn": Case("gptneox", "gpt_neox", same_heads(use_parallel_residual=False, attention_bias=False),
                            {EPS: "layer_norm_eps", "use_parallel_residual": False} | PART, NEOX_NAMES,
                            {"query_key_value": apart}),
    "gpt2": Case("gpt2", "gpt2", GPT, {EPS: "layer_norm_epsilon"}, GPT2_NAMES,
                 dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), turned)),
}  # fmt: skip


def make(case: Case, folder: Path) -> Path:
    """The model as transformers saves it; norms and biases are random as well, so that a lost one shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and 0.5))
    model.save_pretrained(folder)
    return folder


def write(path: Path, case: Case, folder: Path, kind: Type = Type.F32) -> dict[str, Array]:
    """The model in `folder` as GGUF, matrices as `kind`. Returns what the file's values mean, by the names there."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    known = GPT_METADATA if case.model_type == "gpt2" else METADATA
    for key, said in (known | case.keys).items():
        value = config.get(said) if isinstance(said, str) and said in config else said
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value != said or not isinstance(said, str) or said not in METADATA.values():
            kinds[type(value)](f"{case.architecture}.{key}", value)
    meant: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}
    for name, values in safetensors.numpy.load_file(folder / "model.safetensors").items():
        if ".norms." in name:
            stacks.setdefault(f"{name.split('_layernorm')[0]}_norm.weight", []).append(values)
            meant[name] = values
        else:
            meant[name] = _add(writer, case, name, values, config, kind)
    for name, parts in stacks.items():
        _add(writer, case, name, np.stack(parts), config, kind)
    for name, factors in case.tensors.items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def logits(folder: Path, tensors: Mapping[str, Array], tokens: list[int]) -> Array:
    """What transformers makes of the model in `folder` with these tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Array = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def _add(writer: Any, case: Case, name: str, values: Array, config: Mapping[str, Any], kind: Type) -> Array:
    """Write one tensor. Returns what its stored values mean."""
    theirs = f"{name}."  # so that every module has its dot
    for module, ours in case.names.items():
        theirs = theirs.replace(f"{module}.", f"{ours}.")
    change = next((c for part, c in case.changes.items() if part in name), lambda values, _: values)
    stored = np.ascontiguousarray(change(values, config))
    if values.ndim == 1 or "_norm" in name:
        writer.add_tensor(theirs[:-1], stored)
        return values
    data = encode(stored, kind)
    writer.add_tensor(theirs[:-1], data, raw_dtype=kind)
    places = change(np.arange(values.size).reshape(values.shape), config)
    back = np.empty(values.size, np.float32)
    back[places.reshape(-1)] = gguf.quants.dequantize(data, kind).reshape(-1)
    return back.reshape(values.shape)
