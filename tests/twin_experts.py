"""The tensors of a mixture of experts by role, put together by torch: the twin's own map, written by hand."""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def is_mixture(config: dict[str, Any]) -> bool:
    return config["model_type"] in ("mixtral", "qwen2_moe", "qwen3_moe")


def expert_roles(tensors: Tensors, layer: int, config: dict[str, Any]) -> Tensors:
    """The feed-forward roles of a layer; empty where it is dense."""
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
