"""The verbs in float64 numpy, as plainly as they can be written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.backend.base import PLAIN, Scoring
from flashinfer.quant import Codec, codec_named

Array = npt.NDArray[Any]


def encoded(values: Array, codec: str | Codec) -> tuple[npt.NDArray[np.uint8], Array]:
    """Rows as bytes `[rows, row bytes]`, and the values those stand for."""
    coder = codec_named(codec) if isinstance(codec, str) else codec
    raw = coder.encode(values.astype(np.float32))
    return raw, coder.decode(raw, values.shape[1]).astype(np.float64)


def rounding_bound(x: Array, values: Array, of_largest: float) -> Array:
    """How far products of x `[tokens, cols]` with rows may lie off where each x is by `of_largest` times the largest of
    its 32 columns, and sums are float32."""
    pad = -x.shape[1] % 32
    largest = np.abs(np.pad(x, ((0, 0), (0, pad)))).reshape(len(x), -1, 32).max(axis=2)
    off = np.repeat(largest, 32, axis=1)[:, : x.shape[1]] * of_largest
    sums = 1e-6 * np.abs(x) @ np.abs(values).T
    return off @ np.abs(values).T + sums + 1e-30


def unaligned(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The same bytes at an odd address."""
    memory = np.empty(raw.size + 64, dtype=np.uint8)
    at = 1 - memory.ctypes.data % 2 + 2 * 7
    memory[at : at + raw.size] = raw.reshape(-1)
    return memory[at : at + raw.size]


def activated(x: Array, kind: str, threshold: float = 0.0) -> Array:
    x = x.astype(np.float64)
    erf = np.vectorize(math.erf, otypes=[np.float64])
    with np.errstate(over="ignore"):
        match kind:
            case "relu" | "drelu":
                return np.maximum(x, 0)
            case "fatrelu":
                return np.where(x > threshold, x, 0)
            case "shifted_relu":
                return np.maximum(x - threshold, 0)
            case "relu2":
                return np.maximum(x, 0) ** 2
            case "silu":
                return x / (1 + np.exp(-x))
            case "gelu":
                return 0.5 * x * (1 + erf(x / math.sqrt(2)))
            case "gelu_tanh":
                return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            case "swiglu_oai":
                return np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7)))
            case "clamped":
                return np.clip(x, -7, 7) + 1
            case _:
                return x / (1 + np.exp(-1.702 * x))


def normed(x: Array, weight: Array | None, bias: Array | None, kind: str, eps: float) -> Array:
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def attended(q: Array, k: Array, v: Array, first: int, heads: int, scoring: Scoring = PLAIN) -> Array:
    """q `[tokens, heads * dim]` at positions first, ...; k and v `[positions, kv heads * dim]`, v with its own dim."""
    tokens = len(q)
    dim = q.shape[1] // heads
    kv_heads = k.shape[1] // dim
    qs, ks, vs = (a.astype(np.float64).reshape(len(a), n, -1) for a, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    out = np.zeros((tokens, heads, vs.shape[2]))
    for t in range(tokens):
        for h in range(heads):
            at = first + t
            seen = np.arange(0 if scoring.window is None else max(0, at - scoring.window + 1), at + 1)
            scores = ks[seen, h * kv_heads // heads] @ qs[t, h] / math.sqrt(dim)
            if scoring.softcap is not None:
                scores = scoring.softcap * np.tanh(scores / scoring.softcap)
            if scoring.slopes is not None:
                scores = scores - float(scoring.slopes[h]) * (at - seen)
            weights = np.exp(scores)
            total = weights.sum() + (0 if scoring.sinks is None else math.exp(scoring.sinks[h]))
            out[t, h] = weights @ vs[seen, h * kv_heads // heads] / total
    return out.reshape(tokens, -1)
