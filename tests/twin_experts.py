"""The tensors of a mixture of experts by role, put together by torch: the twin's own map, written by hand."""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def is_mixture(config: dict[str, Any]) -> bool:
    return config["model_type"] in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")


def expert_roles(tensors: Tensors, layer: int, config: dict[str, Any]) -> Tensors:
    """The feed-forward roles of a layer; empty where it is dense. Of gpt-oss and DeepSeek what is theirs of attention,
    too."""
    if config["model_type"] == "gpt_oss":
        return _gpt_oss(tensors, layer)
    if config["model_type"] == "deepseek_v3":
        return _latent(tensors, layer, config) | _routed(tensors, layer, config)
    return _routed(tensors, layer, config)


def _routed(tensors: Tensors, layer: int, config: dict[str, Any]) -> Tensors:
    mixtral = config["model_type"] == "mixtral"
    name = f"model.layers.{layer}." + ("block_sparse_moe" if mixtral else "mlp")
    if f"{name}.gate.weight" not in tensors:
        return {}
    found = {f"layers.{layer}.ffn.router.weight": tensors[f"{name}.gate.weight"]}
    if f"{name}.gate.e_score_correction_bias" in tensors:
        found[f"layers.{layer}.ffn.router.correction"] = tensors[f"{name}.gate.e_score_correction_bias"]
    if f"{name}.shared_expert_gate.weight" in tensors:
        found[f"layers.{layer}.ffn.shared_gate.weight"] = tensors[f"{name}.shared_expert_gate.weight"]
    for part in ("gate", "up", "down"):
        of = MIXTRAL[part] if mixtral else f"{part}_proj"
        count = next(config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config)
        parts = [tensors[f"{name}.experts.{e}.{of}.weight"] for e in range(count)]
        shared = (f"{name}.shared_expert{s}.{of}.weight" for s in ("", "s"))
        parts += [tensors[each] for each in shared if each in tensors]
        found[f"layers.{layer}.ffn.{part}.weight"] = torch.cat(parts, dim=1 if part == "down" else 0)
    return found


def _gpt_oss(tensors: Tensors, layer: int) -> Tensors:
    """Gates and ups lie in turn, and everything is the other way round."""
    name = f"model.layers.{layer}.mlp"
    fused, bias = (tensors[f"{name}.experts.gate_up_proj{kind}"] for kind in ("", "_bias"))
    found = {"attn.sinks": tensors[f"model.layers.{layer}.self_attn.sinks"]}
    found |= {f"ffn.router.{kind}": tensors[f"{name}.router.{kind}"] for kind in ("weight", "bias")}
    found["ffn.expert_bias.weight"] = tensors[f"{name}.experts.down_proj_bias"].T
    for start, part in enumerate(("gate", "up")):
        found[f"ffn.{part}.weight"] = fused[:, :, start::2].transpose(1, 2).flatten(0, 1)
        found[f"ffn.{part}.bias"] = bias[:, start::2].flatten()
    found["ffn.down.weight"] = tensors[f"{name}.experts.down_proj"].flatten(0, 1).T
    return {f"layers.{layer}.{role}": tensor for role, tensor in found.items()}


def _latent(tensors: Tensors, layer: int, config: dict[str, Any]) -> Tensors:
    """What is turned comes first in each head, its pairs apart; the fused matrices are taken apart."""
    name, heads = f"model.layers.{layer}.self_attn", config["num_attention_heads"]
    nope, rope, rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))

    def apart(turned: torch.Tensor) -> torch.Tensor:
        return torch.cat([turned[..., ::2, :], turned[..., 1::2, :]], dim=-2)

    q, kv_a, kv_b = (tensors[f"{name}.{part}.weight"] for part in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
    q, kv_b = (matrix.view(heads, -1, matrix.shape[1]) for matrix in (q, kv_b))
    found = {f"q_a{k}": tensors[f"{name}.q_a_{long}.weight"] for k, long in (("", "proj"), ("_norm", "layernorm"))}
    found["q_b"] = torch.cat([apart(q[:, nope:]), q[:, :nope]], dim=1).flatten(0, 1)
    found |= {"kv_a": kv_a[:rank], "kv_a_norm": tensors[f"{name}.kv_a_layernorm.weight"], "k_rope": apart(kv_a[rank:])}
    found |= {"k_b": kv_b[:, :nope].flatten(0, 1), "v_b": kv_b[:, nope:].flatten(0, 1)}
    assert kv_a.shape[0] == rank + rope
    return {f"layers.{layer}.attn.{role}.weight": tensor for role, tensor in found.items()}
