"""The tensors of a mixture of experts by role, put together by torch: the twin's own map, written by hand."""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def is_mixture(config: dict[str, Any]) -> bool:
    return config["model_type"] in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def expert_roles(tensors: Tensors, layer: int, config: dict[str, Any]) -> Tensors:
    """The feed-forward roles of a layer; empty where it is dense. Of gpt-oss its sinks, too."""
    if config["model_type"] == "gpt_oss":
        return _gpt_oss(tensors, layer)
    mixtral = config["model_type"] == "mixtral"
    name = f"model.layers.{layer}." + ("block_sparse_moe" if mixtral else "mlp")
    if f"{name}.gate.weight" not in tensors:
        return {}
    found = {f"layers.{layer}.ffn.router.weight": tensors[f"{name}.gate.weight"]}
    if f"{name}.shared_expert_gate.weight" in tensors:
        found[f"layers.{layer}.ffn.shared_gate.weight"] = tensors[f"{name}.shared_expert_gate.weight"]
    for part in ("gate", "up", "down"):
        of = MIXTRAL[part] if mixtral else f"{part}_proj"
        count = config.get("num_local_experts", config.get("num_experts"))
        parts = [tensors[f"{name}.experts.{e}.{of}.weight"] for e in range(count)]
        if f"{name}.shared_expert.{of}.weight" in tensors:
            parts.append(tensors[f"{name}.shared_expert.{of}.weight"])
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
