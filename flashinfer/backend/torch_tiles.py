"""Arithmetic of the torch backend on tiles: functions of tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer.backend.base import Scoring
from flashinfer.backend.torch_weights import DTYPES, pack_int8g32, there, unpack
from flashinfer.config import TILE_KEYS, TILE_TOKENS
from flashinfer.store.facts import Activation, UpActivation

SWIGLU_LIMIT = 7.0
"""Beyond it gate and up of `swiglu_oai` are cut off."""


def activated(x: Tensor, kind: Activation | UpActivation, threshold: float = 0.0) -> Tensor:
    """Products as activations, `facts.Activation` and `facts.UpActivation` say which."""
    match kind:
        case "relu" | "drelu":
            return torch.relu(x)
        case "relu2":
            return torch.relu(x).square()
        case "fatrelu":
            return x.masked_fill(x <= threshold, 0.0)
        case "shifted_relu":
            return torch.relu(x - threshold)
        case "silu":
            return F.silu(x)
        case "gelu_quick":
            return x * torch.sigmoid(1.702 * x)
        case "swiglu_oai":
            return activated(x.clamp(max=SWIGLU_LIMIT), "gelu_quick")
        case "clamped":
            return x.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0
        case _:
            return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@dataclass(frozen=True)
class Kv:
    """Keys and values `[key tiles, kv heads, TILE_KEYS, bytes]`, each position's `dims` values in a codec: the first n
    tiles are contiguous."""

    k: Tensor
    v: Tensor
    codec: str
    dims: tuple[int, int]

    def encoded(self, values: Tensor) -> Tensor:
        """Values `[..., dim]` as they are kept."""
        if self.codec == "int8g32":
            return pack_int8g32(values.reshape(-1, values.shape[-1])).view(*values.shape[:-1], -1)
        return values.to(DTYPES[self.codec]).view(torch.uint8)

    def keys(self, low: int, end: int) -> Tensor:
        """Keys of tiles `[low, end)` in float32."""
        return self._floats(self.k[low:end], self.dims[0])

    def values(self, low: int, end: int) -> Tensor:
        """Values of tiles `[low, end)` in float32."""
        return self._floats(self.v[low:end], self.dims[1])

    def _floats(self, kept: Tensor, dim: int) -> Tensor:
        if self.codec == "int8g32":
            values = torch.empty(*kept.shape[:-1], dim, device=kept.device)
            unpack(kept.reshape(-1, kept.shape[-1]), self.codec, values.view(-1, dim))
            return values
        return kept.view(DTYPES[self.codec]).float()


def times(x: Tensor, w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`x @ w.T` of the tokens from t on, in the shapes that fix the order of its sums."""
    if len(x) == 1:
        yield 0, torch.mv(w, x[0])[None]
        return
    for t in range(0, len(x), TILE_TOKENS):
        yield t, torch.mm(x[t : t + TILE_TOKENS], w.t())


def attend_tile(q: Tensor, kv: Kv, first: int, heads: int, scoring: Scoring) -> Tensor:
    """Causal attention of rows at first .. first+step, which never straddle a key tile: all look at the same tiles."""
    step = q.shape[0]
    kv_heads, (dim, value_dim) = kv.k.shape[1], kv.dims
    group, end = heads // kv_heads, first // TILE_KEYS + 1
    low = 0 if scoring.window is None else max(0, first + 1 - scoring.window) // TILE_KEYS
    q = (q * dim**-0.5).view(step, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * step, dim)
    scores = torch.matmul(q, kv.keys(low, end).transpose(-1, -2))
    _score(scores.view(end - low, kv_heads, group, step, TILE_KEYS), first, low, scoring)
    most, sinks = scores.amax(dim=(0, 3), keepdim=True), None
    if scoring.sinks is not None:
        sinks = there(scoring.sinks, q.device).view(kv_heads, group, 1).expand(-1, -1, step)
        sinks = sinks.reshape(1, kv_heads, group * step, 1)
        most = torch.maximum(most, sinks)
    weights = torch.exp(scores - most)
    sums, outs = weights.sum(-1, keepdim=True), torch.matmul(weights, kv.values(low, end))
    total, acc = sums[0], outs[0]
    for i in range(1, end - low):  # in order: a longer context only adds terms at the end
        total, acc = total + sums[i], acc + outs[i]
    if sinks is not None:
        total = total + torch.exp(sinks - most)[0]
    y = (acc / total).view(kv_heads, group, step, value_dim).permute(2, 0, 1, 3)
    return y.reshape(step, heads * value_dim)


def _score(scores: Tensor, first: int, low: int, scoring: Scoring) -> None:
    """Scores `[key tiles from low on, kv heads, group, rows, TILE_KEYS]` as `Scoring` has them; those of keys a row
    does not see are minus infinity. Writes `scores`."""
    tiles, kv_heads, group, step, width = scores.shape
    keys = torch.arange(low * width, (low + tiles) * width, device=scores.device).view(tiles, 1, 1, 1, width)
    back = torch.arange(first, first + step, device=scores.device)[:, None] - keys
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.slopes is not None:
        slopes = there(scoring.slopes, scores.device).view(kv_heads, group, 1, 1)
        scores.sub_(slopes * back)
    unseen = back < 0
    if scoring.window is not None:
        unseen |= back >= scoring.window
    scores.masked_fill_(unseen, -torch.inf)
