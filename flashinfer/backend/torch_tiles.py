"""Arithmetic of the torch backend on tiles: functions of tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer.backend.torch_weights import DTYPES, unpack
from flashinfer.config import TILE_KEYS, TILE_TOKENS
from flashinfer.quant import codec_named
from flashinfer.store.facts import Activation


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": _relu2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": _gelu_quick,
}


@dataclass(frozen=True)
class Kv:
    """Keys and values `[key tiles, kv heads, TILE_KEYS, bytes]`, each position's `dim` values in a codec: the first n
    tiles are contiguous."""

    k: Tensor
    v: Tensor
    codec: str
    dim: int

    def encoded(self, values: Tensor) -> Tensor:
        """Values `[..., dim]` as they are kept."""
        if self.codec == "int8g32":
            rows = codec_named(self.codec).encode(values.reshape(-1, self.dim).cpu().numpy())
            return torch.from_numpy(rows).view(*values.shape[:-1], -1).to(values.device)
        return values.to(DTYPES[self.codec]).view(torch.uint8)

    def floats(self, kept: Tensor) -> Tensor:
        """The inverse, in float32."""
        if self.codec == "int8g32":
            values = torch.empty(*kept.shape[:-1], self.dim, device=kept.device)
            unpack(kept.reshape(-1, kept.shape[-1]), self.codec, values.view(-1, self.dim))
            return values
        return kept.view(DTYPES[self.codec]).float()


def times(x: Tensor, w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`x @ w.T` of the tokens from t on, in the shapes that fix the order of its sums."""
    if len(x) == 1:
        yield 0, torch.mv(w, x[0])[None]
        return
    for t in range(0, len(x), TILE_TOKENS):
        yield t, torch.mm(x[t : t + TILE_TOKENS], w.t())


def attend_tile(q: Tensor, kv: Kv, first: int, heads: int) -> Tensor:
    """Causal attention of rows at first .. first+step, which never straddle a key tile: all see the same key tiles."""
    step = q.shape[0]
    kv_heads, dim = kv.k.shape[1], kv.dim
    group, tiles = heads // kv_heads, first // TILE_KEYS + 1
    q = (q * dim**-0.5).view(step, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * step, dim)
    scores = torch.matmul(q, kv.floats(kv.k[:tiles]).transpose(-1, -2))
    keys = torch.arange((tiles - 1) * TILE_KEYS, tiles * TILE_KEYS, device=q.device)
    seen = keys <= torch.arange(first, first + step, device=q.device)[:, None]
    scores[-1].view(kv_heads, group, step, TILE_KEYS).masked_fill_(~seen, -torch.inf)
    weights = torch.exp(scores - scores.amax(dim=(0, 3), keepdim=True))
    sums, outs = weights.sum(-1, keepdim=True), torch.matmul(weights, kv.floats(kv.v[:tiles]))
    total, acc = sums[0], outs[0]
    for i in range(1, tiles):  # in order: a longer context only adds terms at the end
        total, acc = total + sums[i], acc + outs[i]
    y = (acc / total).view(kv_heads, group, step, dim).permute(2, 0, 1, 3)
    return y.reshape(step, heads * dim)
