"""A tiny checkpoint of every family, written by transformers: the config each comes in. Odd sizes, grouped heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
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
GPT_SIZES: dict[str, Any] = {
    "vocab_size": 89, "hidden_size": 40, "n_layer": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA3: dict[str, Any] = SIZES | {
    "head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
}  # fmt: skip
EYES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
FALCON: dict[str, Any] = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_hidden_size": 107,
}  # fmt: skip
MPT: dict[str, Any] = {
    "vocab_size": 89, "d_model": 40, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_dim": 107, "word_embed_proj_dim": 40,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": 89, "n_embd": 40, "n_inner": 107, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: transformers' name of the family, and what its config says beside the sizes.

    attention: which of transformers' is right; most leave out what caps scores. A family that transformers does not
    have is one it has whose config.json says `says` beside; `oracle` then makes that family's model of the other's.
    """

    model_type: str
    config: dict[str, Any]
    attention: str = "eager"
    says: dict[str, Any] = field(default_factory=dict)
    oracle: Callable[[Any], None] | None = None


def _case(model_type: str, **config: Any) -> Case:
    return Case(model_type, SIZES | config)


def _no_groups(model_type: str, **config: Any) -> Case:
    return Case(model_type, {k: v for k, v in (SIZES | config).items() if k != "num_key_value_heads"})


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def _activated(activate: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A llama with another activation."""

    def oracle(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn.forward = activate

    return oracle


def _fatrelu(x: Any) -> Any:
    return x * (x > FAT)


def _scaled_like_minicpm(model: Any) -> None:
    """What MiniCPM multiplies with, put into the weights of a llama."""
    layers = model.model.layers
    model.model.embed_tokens.weight.data *= MINICPM["scale_emb"]
    model.lm_head.weight.data *= MINICPM["dim_model_base"] / SIZES["hidden_size"]
    for layer in layers:
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            matrix.weight.data *= MINICPM["scale_depth"] / len(layers) ** 0.5
        layer.mlp.act_fn.forward = _fatrelu


def _twice_rectified(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = partial(_drelu, layer.mlp)


def _drelu(mlp: Any, x: Any) -> Any:
    return mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x).relu())


FAT = 0.25
MINICPM: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
    "hidden_act": "fatrelu", "hidden_act_param": FAT, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
}  # fmt: skip
LONG = [1.0 + 0.7 * i for i in range(5)]
CASES: dict[str, Case] = {
    "llama": _case("llama"),
    "llama-relu": _case("llama", hidden_act="relu", attention_bias=True, mlp_bias=True),
    "opt": Case("opt", OPT),
    "opt-post-norm": Case("opt", OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "nanochat": _case("nanochat", final_logit_softcapping=3.0),
    "mistral": _case("mistral", sliding_window=None, head_dim=16),
    "mistral-window": _case("mistral", sliding_window=24),
    "qwen2": _case("qwen2", tie_word_embeddings=True),
    "qwen2-window": _case("qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": _case("qwen3", head_dim=12, attention_bias=True),
    "gemma": _case("gemma", head_dim=12),
    "gemma2": _case("gemma2", head_dim=12, query_pre_attn_scalar=7, sliding_window=24, attn_logit_softcapping=0.8,
                    final_logit_softcapping=3.0),
    "gemma3": Case("gemma3_text", GEMMA3),
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
    "gemma3-with-pictures": Case("gemma3", {"text_config": GEMMA3, "vision_config": EYES,
                                            "image_token_index": 88, "boi_token_index": 87, "eoi_token_index": 86,
                                            "mm_tokens_per_image": 4}),
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
    "phi3-window": _case("phi3", sliding_window=24),
    "starcoder2": _case("starcoder2"),
    "starcoder2-window": _case("starcoder2", sliding_window=24),
    "mpt": Case("mpt", MPT),
    "mpt-six-heads": Case("mpt", MPT | {"d_model": 42, "n_heads": 6, "attn_config": {"softmax_scale": 0.2}}),
    "bloom": Case("bloom", GPT_SIZES | {"n_head": 5}),
    "falcon-7b": Case("falcon", FALCON | {"activation": "relu"}),
    "falcon-40b": Case("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Case("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2,
                                           "num_ln_in_parallel_attn": 1}),
    "falcon-rw": Case("falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
                      attention="sdpa"),  # its eager attention adds the biases twice
    "llama-fatrelu": replace(_case("llama"), says={"hidden_act": "fatrelu", "hidden_act_param": FAT},
                             oracle=_activated(_fatrelu)),
    "llama-shifted-relu": replace(_case("llama"), says={"hidden_act": "shifted_relu", "hidden_act_param": FAT},
                                  oracle=_activated(lambda x: (x - FAT).relu())),
    "minicpm": replace(_case("llama"), says=MINICPM, oracle=_scaled_like_minicpm),
    "bamboo": replace(_case("mistral", sliding_window=24), oracle=_twice_rectified,
                      says={"architectures": ["BambooForCausalLM"], "hidden_act": "relu"}),
    "llama-yarn": _case("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=24)),
    "llama-yarn-mscale": _case("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=1.0,
                                                mscale_all_dim=0.7, beta_fast=4.0, truncate=False)),
    "llama-dynamic": _case("llama", **_rope("dynamic", factor=2.0)),
    "phi3-longrope": _case("phi3", original_max_position_embeddings=32,
                           **_rope("longrope", short_factor=[1.0] * 5, long_factor=LONG)),
    "mixtral": _case("mixtral", num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": _case("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=32),
    "qwen2_moe-mixed": _case("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=36, decoder_sparse_step=2,
                             norm_topk_prob=True, qkv_bias=False),
    "qwen3_moe": _case("qwen3_moe", **EXPERTS, head_dim=12, norm_topk_prob=True),
    "qwen3_moe-mixed": _case("qwen3_moe", **EXPERTS, mlp_only_layers=[1]),
    "olmoe": _case("olmoe", num_experts=6, num_experts_per_tok=3),
    "granitemoe": _case("granitemoe", num_local_experts=6, num_experts_per_tok=2, embedding_multiplier=12.0,
                        logits_scaling=7.0, residual_multiplier=0.22, attention_multiplier=0.15),
    "gpt_oss": _case("gpt_oss", num_local_experts=6, num_experts_per_tok=2, head_dim=12, sliding_window=24,
                     **_rope("yarn", factor=4.0, original_max_position_embeddings=24, truncate=False)),
    "deepseek_v2": _no_groups("deepseek_v2", **DEEPSEEK, q_lora_rank=24, n_routed_experts=8, n_shared_experts=2,
                              num_experts_per_tok=3, routed_scaling_factor=1.5, topk_method="group_limited_greedy",
                              n_group=4, topk_group=2, first_k_dense_replace=1),
    "deepseek_v2-lite": _no_groups("deepseek_v2", **DEEPSEEK, q_lora_rank=None, n_routed_experts=6, n_shared_experts=1,
                                   num_experts_per_tok=2, attention_bias=True,
                                   **_rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=0.707,
                                           mscale_all_dim=0.707)),
    "deepseek_v3": _case("deepseek_v3", **DEEPSEEK, num_key_value_heads=4, q_lora_rank=24, n_routed_experts=8,
                         n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=2,
                         **_rope("yarn", factor=4.0, original_max_position_embeddings=24, mscale=1.0,
                                 mscale_all_dim=0.8)),
}  # fmt: skip


def make(name: str, path: Path, dtype: str = "float32") -> Path:
    """Write the checkpoint of a case under `path`. Returns `path`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    case = CASES[name]
    save(AutoModelForCausalLM.from_config, AutoConfig.for_model(case.model_type, **case.config), path, dtype)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | case.says))
    return path


def reference(name: str, path: Path) -> Any:
    """What a case's model is to transformers, in float32, of the checkpoint `make` wrote under `path`; experts one by
    one, for faster ways want even sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    case = CASES[name]
    config = AutoConfig.for_model(case.model_type, **case.config)
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation=case.attention, experts_implementation="eager"
    ).eval()
    if case.oracle is not None:
        case.oracle(model)
    return model
