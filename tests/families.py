"""A tiny checkpoint of every family, written by transformers: the config each comes in. Odd sizes, grouped heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import save

CONTEXT = 96
SIZES: dict[str, Any] = {
    "vocab_size": 89, "hidden_size": 40, "intermediate_size": 107, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
"""Heads of 10 values: half of them, and four fifths, can be turned."""
GPT: dict[str, Any] = {
    "vocab_size": 89, "n_embd": 40, "n_inner": 107, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: transformers' name of the family, and what its config says beside the sizes."""

    model_type: str
    config: dict[str, Any]


def _case(model_type: str, **config: Any) -> Case:
    return Case(model_type, SIZES | config)


def _no_groups(model_type: str, **config: Any) -> Case:
    return Case(model_type, {k: v for k, v in (SIZES | config).items() if k != "num_key_value_heads"})


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LONG = [1.0 + 0.7 * i for i in range(5)]
CASES: dict[str, Case] = {
    "mistral": _case("mistral", sliding_window=None, head_dim=16),
    "mistral-window": _case("mistral", sliding_window=80),
    "qwen2": _case("qwen2", tie_word_embeddings=True),
    "qwen3": _case("qwen3", head_dim=12, attention_bias=True),
    "arcee": _case("arcee"),
    "arcee-biases": _case("arcee", attention_bias=True, mlp_bias=True),
    "nemotron": _case("nemotron", partial_rotary_factor=0.4, attention_bias=True),
    "olmo2": _case("olmo2", hidden_act="relu"),
    "smollm3": _case("smollm3", no_rope_layers=[1, 0, 1]),
    "granite": _case(
        "granite", embedding_multiplier=12.0, logits_scaling=7.0, residual_multiplier=0.22, attention_multiplier=0.15
    ),
    "helium": _case("helium", head_dim=10),
    "cohere": _case("cohere", attention_bias=True),
    "cohere-qk-norm": _case("cohere", use_qk_norm=True, logit_scale=0.5),
    "gpt_neox": _no_groups("gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                        "partial_rotary_factor": 0.4}),
    "gpt_neox-in-turn": _no_groups("gpt_neox", use_parallel_residual=False, hidden_act="relu", attention_bias=False),
    "phi": _case("phi", partial_rotary_factor=0.4),
    "stablelm": _case("stablelm", use_qkv_bias=True, partial_rotary_factor=0.4),
    "stablelm-12b": _case("stablelm", use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.4),
    "persimmon": _no_groups("persimmon", partial_rotary_factor=0.8),
    "gpt2": Case("gpt2", GPT),
    "gptj": Case("gptj", GPT | {"rotary_dim": 6}),
    "phi3": _case("phi3", partial_rotary_factor=0.8),
    "starcoder2": _case("starcoder2"),
    "llama-yarn": _case("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=24)),
    "llama-yarn-mscale": _case("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=1.0,
                                                mscale_all_dim=0.7, beta_fast=4.0, truncate=False)),
    "llama-dynamic": _case("llama", **_rope("dynamic", factor=2.0)),
    "phi3-longrope": _case("phi3", original_max_position_embeddings=32,
                           **_rope("longrope", short_factor=[1.0] * 5, long_factor=LONG)),
}  # fmt: skip


def make(name: str, path: Path, dtype: str = "float32") -> Path:
    """Write the checkpoint of a case under `path`. Returns `path`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    case = CASES[name]
    return save(AutoModelForCausalLM.from_config, AutoConfig.for_model(case.model_type, **case.config), path, dtype)
