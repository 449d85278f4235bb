"""A tiny model of each architecture, and what llama.cpp's converter says and does of it.

What the converter does to names, rows and values is written down here once more, in its own way (by reshapes, from
Hugging Face to GGUF), apart from the tables and orders under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

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
MPT: dict[str, Any] = {
    "vocab_size": 40, "d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BLOOM: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 256, "n_layer": 2, "n_head": 4, "seq_length": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FALCON: dict[str, Any] = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_hidden_size": 512,
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
GEMMA_NAMES = LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
MPT_NAMES = {
    "transformer.blocks": "blk", "transformer.wte": "token_embd", "transformer.norm_f": "output_norm",
    "norm_1": "attn_norm", "norm_2": "ffn_norm", "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output",
    "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down",
}  # fmt: skip
BLOOM_NAMES = {
    "transformer.h": "blk", "transformer.word_embeddings": "token_embd", "transformer.ln_f": "output_norm",
    "transformer.word_embeddings_layernorm": "token_embd_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip
FALCON_NAMES = BLOOM_NAMES | {"ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"}
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
    `says`: what config.json says of a family that transformers has not, beside that of the nearest one.
    `changes`: part of a tensor's name -> what is done to its values; the first that fits counts.
    `experts_apart`: each expert has tensors of its own.
    """

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    changes: dict[str, Callable[[Array, Mapping[str, Any]], Array]] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    experts_apart: bool = False


def pairs(values: Array, heads: int) -> Array:
    """llama.cpp's `permute`: rows of each head from halves to pairs."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def apart(values: Array, config: Mapping[str, Any]) -> Array:
    """q, k and v of each head, one after the other, to all of q, all of k, all of v."""
    shape = values.shape
    parted = values.reshape(config.get("num_attention_heads", config.get("n_head")), 3, -1, *shape[1:])
    return parted.swapaxes(0, 1).reshape(shape)


def grouped_apart(values: Array, config: Mapping[str, Any]) -> Array:
    """The same of groups of queries that share a key and a value."""
    heads = config["num_attention_heads"]
    kv = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    parted = values.reshape(kv, heads // kv + 2, -1, *values.shape[1:])
    parts = (parted[:, :-2], parted[:, -2], parted[:, -1])
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])


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
KEYS32 = {RMS_EPS: "rms_norm_eps", "attention.key_length": 32, "attention.value_length": 32}
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
    "gemma": Case("gemma", "gemma", SIZES | {"head_dim": 32}, KEYS32 | ROPE, changes={"norm.weight": one_more}),
    "gemma2": Case(
        "gemma2", "gemma2",
        SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "attn_logit_softcapping": 0.75,
                 "final_logit_softcapping": 3.0},
        KEYS32 | {"attention.sliding_window": 24, "attn_logit_softcapping": 0.75, "final_logit_softcapping": 3.0},
        GEMMA_NAMES, {"norm.weight": one_more},
    ),
    "gemma3": Case(
        "gemma3", "gemma3_text",
        SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "num_hidden_layers": 7,
                 "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                     "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        KEYS32 | {"attention.sliding_window": 24, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
                  "rope.scaling.factor": 8.0},
        GEMMA_NAMES, {"norm.weight": one_more},
    ),
    "gemma3-full": Case(
        "gemma3", "gemma3_text",
        SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": None,
                 "layer_types": ["full_attention"] * 2},
        KEYS32 | {"rope.freq_base": 1e6}, GEMMA_NAMES, {"norm.weight": one_more},
    ),
    "minicpm": Case(
        "minicpm", "llama", SIZES,
        WHOLE | {RMS_EPS: "rms_norm_eps", "embedding_scale": 12.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 4.0},
        changes=PAIRS,
        says={"architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64,
              "tie_word_embeddings": False},
    ),
    "mpt": Case("mpt", "mpt", MPT, {
        "context_length": "max_seq_len", "embedding_length": "d_model", "block_count": "n_layers", EPS: 1e-5,
        "feed_forward_length": 1024, "attention.head_count": "n_heads", "attention.max_alibi_bias": 8.0,
    }, MPT_NAMES),
    "bloom": Case("bloom", "bloom", BLOOM, {
        "context_length": CONTEXT, "embedding_length": "hidden_size", "feed_forward_length": 1024, EPS: 1e-5,
        "block_count": "n_layer", "attention.head_count": "n_head",
    }, BLOOM_NAMES, {"query_key_value": apart}),
    "falcon-7b": Case("falcon", "falcon", FALCON, ROPE | {EPS: 1e-5, "feed_forward_length": 512,
                      "attention.head_count_kv": 1}, FALCON_NAMES, {"query_key_value": grouped_apart}),
    "falcon-40b": Case("falcon", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, ROPE | {
        EPS: 1e-5, "feed_forward_length": 512, "attention.head_count_kv": 2,
    }, FALCON_NAMES, {"query_key_value": grouped_apart}),
    "falcon-11b": Case("falcon", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2,
                       "num_ln_in_parallel_attn": 1}, ROPE | {EPS: 1e-5, "feed_forward_length": 512,
                       "attention.head_count_kv": 2}, FALCON_NAMES, {"query_key_value": grouped_apart}),
    "gpt2": Case("gpt2", "gpt2", GPT, {EPS: "layer_norm_epsilon"}, GPT2_NAMES,
                 dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), turned)),
}  # fmt: skip
