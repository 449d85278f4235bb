"""LoRA adapters for tests: made by peft on a checkpoint, or written by hand for the plain one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.plain_checkpoint import fill, save

ATTENTION = ["q_proj", "v_proj"]
TOKENS = [5, 17, 3, 60, 2, 9, 80, 31]
A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"
MODULE = "base_model.model.model.layers.0.self_attn."


def made_by_peft(
    base: Path, adapter: Path, *, model: Any = None, safetensors: bool = True, seed: int = 1, **config: Any
) -> np.ndarray:
    """An adapter of random values under `adapter`; the logits of the model with it, unmerged, for `TOKENS`.

    `model`: the base's, where transformers does not make it of the checkpoint by itself.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that biases change, or that a whole head is saved, as asked
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(adapter, safe_serialization=safetensors)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def by_hand(root: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """An adapter for the plain checkpoint: rank 2 on one q_proj, unless `tensors` say otherwise."""
    root.mkdir()
    if tensors is None:
        tensors = fill({MODULE + A: (2, 16), MODULE + B: (16, 2)})
    save(root / "adapter_model.safetensors", tensors)
    (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config))
    return root


DEMO_SHAPES = {
    "self_attn.q_proj": (192, 192), "self_attn.o_proj": (192, 192), "mlp.gate_proj": (1536, 192),
    "mlp.up_proj": (1536, 192), "mlp.down_proj": (192, 1536),
}  # fmt: skip
"""Matrices `[out, in]` of the embedded model, in each of its five layers."""


def for_demo(root: Path, *, rank: int = 4, seed: int = 1) -> Path:
    """An adapter for the embedded model, large enough to change the text."""
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(5):
        for name, (out, size) in DEMO_SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = random.normal(0, size**-0.5, (rank, size)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = random.normal(0, 0.5, (out, rank)).astype(np.float32)
    return by_hand(root, tensors, r=rank, lora_alpha=rank)
