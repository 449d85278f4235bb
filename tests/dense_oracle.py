"""The second oracle: a dense forward pass in plain torch; no tiles, no selection, nothing of ours but the facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer.store import Facts
from tests.twin import role_tensors

ACTIVATIONS = {"relu": F.relu, "relu2": lambda x: F.relu(x) ** 2, "silu": F.silu, "gelu": F.gelu}


def dense_logits(path: Path, facts: Facts, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits `[len(tokens), vocab]` of a pre-norm llama or opt checkpoint without rotary scaling."""
    w = {name: tensor.double() for name, tensor in role_tensors(path).items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        if facts.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], w.get(f"{name}.weight"), w.get(f"{name}.bias"), facts.norm_eps)
        return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], facts.norm_eps)

    x = w["embed.weight"][tokens]
    if facts.rope is None:
        x = x + w["embed.positions"][facts.position_offset : facts.position_offset + len(tokens)]
    for i in range(facts.num_layers):
        x = x + attention(norm(x, f"layers.{i}.attn.norm"), f"layers.{i}.attn", linear, facts)
        y = norm(x, f"layers.{i}.ffn.norm")
        h = ACTIVATIONS[facts.activation](linear(y, f"layers.{i}.ffn.{facts.decision}"))
        x = x + linear(h * linear(y, f"layers.{i}.ffn.up") if facts.gated else h, f"layers.{i}.ffn.down")
    logits = F.linear(norm(x, "final_norm"), w["embed.weight" if facts.tied_head else "head.weight"])
    return logits.float().numpy()


def attention(x: Tensor, name: str, linear, facts: Facts) -> Tensor:
    n, d = len(x), facts.head_dim
    q, k, v = (linear(x, f"{name}.{p}").view(n, -1, d).transpose(0, 1) for p in "qkv")
    if facts.rope is not None:
        angle = torch.outer(torch.arange(n).double(), facts.rope.theta ** (-torch.arange(0, d, 2).double() / d))
        q, k = (torch.view_as_real(turn(y, angle)).transpose(-1, -2).reshape(y.shape) for y in (q, k))
    k, v = (y.repeat_interleave(facts.num_heads // facts.num_kv_heads, dim=0) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(y.transpose(0, 1).reshape(n, -1), f"{name}.o")


def turn(y: Tensor, angle: Tensor) -> Tensor:
    """Rotation as multiplication of complex numbers: (first half) + i (second half)."""
    a, b = y.chunk(2, dim=-1)
    return torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
