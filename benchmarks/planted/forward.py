"""The arithmetic of both families over whole texts, one layer after the other, in float32.

Where a matrix comes from is the affair of `Products`: read from a checkpoint, or made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .recency import rotary_frequencies
from .shapes import Shape

Floats = npt.NDArray[np.float32]
Observer = Callable[[int, Floats, Floats], None]
"""Called with the layer, the FFN's input `[texts, tokens, hidden]` and its pre-activations `[.., neurons]`."""


class Products(Protocol):
    """The weights, as what they make of an activation `[texts, tokens, width]`; biases are added."""

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token and position embeddings of `[texts, tokens]`."""
        ...

    def vectors(self, role: str, layer: int | None) -> tuple[Floats, Floats | None]:
        """Weight and bias of a norm."""
        ...

    def linear(self, x: Floats, role: str, layer: int) -> Floats:
        """A matrix's product, bias added."""
        ...


def product(x: Floats, rows: Floats) -> Floats:
    """`x @ rows.T`, by the library that also does the rest: two of them would fight for the cores."""
    result: Floats = (torch.from_numpy(x) @ torch.from_numpy(rows).T).numpy()
    return result


def run(shape: Shape, products: Products, ids: npt.NDArray[np.int64], observe: Observer | None = None) -> Floats:
    """Hidden states of `[texts, tokens]` ids after the last layer."""
    x = products.embed(ids)
    for layer in range(shape.layers):
        x += _attention(shape, products, layer, norm(shape, products, x, "attn.norm", layer))
        x += _ffn(shape, products, layer, norm(shape, products, x, "ffn.norm", layer), observe)
    return x


def norm(shape: Shape, products: Products, x: Floats, role: str, layer: int | None) -> Floats:
    """RMSNorm of a llama, LayerNorm of an OPT."""
    weight, bias = products.vectors(role, layer)
    if bias is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    scaled: Floats = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + shape.norm_eps) * weight
    return scaled if bias is None else scaled + bias


def _ffn(shape: Shape, products: Products, layer: int, x: Floats, observe: Observer | None) -> Floats:
    z = products.linear(x, "ffn.gate", layer)
    if observe:
        observe(layer, x, z)
    hidden = _activate(z, shape.activation)
    if shape.gated:
        hidden *= products.linear(x, "ffn.up", layer)
    return products.linear(hidden, "ffn.down", layer)


def _activate(z: Floats, activation: str) -> Floats:
    return np.maximum(z, 0) if activation == "relu" else z / (1 + np.exp(-z))


def _attention(shape: Shape, products: Products, layer: int, x: Floats) -> Floats:
    texts, tokens, _ = x.shape
    q, k, v = (products.linear(x, f"attn.{part}", layer) for part in "qkv")
    split = (texts, tokens, shape.heads, shape.head_dim)
    q, k, v = (y.reshape(split).transpose(0, 2, 1, 3) for y in (q, k, v))
    if shape.family == "llama":
        q, k = _rotate(q), _rotate(k)
    q, k, v = (torch.from_numpy(np.ascontiguousarray(y)) for y in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return products.linear(out.reshape(x.shape).numpy(), "attn.o", layer)


def _rotate(x: Floats) -> Floats:
    angles = np.outer(np.arange(x.shape[-2], dtype=np.float32), rotary_frequencies(x.shape[-1]))
    cos, sin, half = np.cos(angles), np.sin(angles), x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
