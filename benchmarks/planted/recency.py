"""Attention heads that look at the last few tokens: q and k whose product falls with the distance.

A sum of cosines and sines of the distance, `sum_j a_j cos(w_j d) + b_j sin(w_j d)`, is what rotary positions
make of two constant vectors, and what a product of learned positions that hold cos(w_j t), sin(w_j t) is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SHORT, LONG = 3.0, 16.0
"""Tokens after which the weight of an earlier token has fallen to 1/e, in the two kinds of heads."""
DEEPEST = 16.0
"""Scores fall no further: what is that far away weighs 1e-7."""


def widths(heads: int) -> Floats:
    """How far each head looks back, in tokens: short-sighted ones, then the others, none like the next."""
    half = heads // 2
    short = SHORT * np.linspace(0.7, 1.3, half)
    return np.concatenate([short, LONG * np.linspace(0.7, 1.3, heads - half)]).astype(np.float32)


def score_series(width: float, frequencies: Floats, context: int) -> tuple[Floats, Floats]:
    """Coefficients (a, b) of the series that comes nearest to `-d / width` (not below `-DEEPEST`) for distances
    0 .. context, up to a constant, which attention does not see."""
    distance = np.arange(context, dtype=np.float64)
    target = -np.minimum(distance / width, DEEPEST)
    weight = np.where(distance < DEEPEST * width, 1.0, 0.1)
    angles = np.outer(distance, frequencies.astype(np.float64))
    design = np.concatenate([np.cos(angles), np.sin(angles), np.ones((context, 1))], axis=1) * weight[:, None]
    ridge = 1e-2 * np.eye(design.shape[1])
    ridge[-1, -1] = 0
    found = np.linalg.solve(design.T @ design + ridge, design.T @ (target * weight))
    n = len(frequencies)
    return found[:n].astype(np.float32), found[n : 2 * n].astype(np.float32)


def rotary_frequencies(head_dim: int, theta: float = 10000.0) -> Floats:
    """Angle per position of each rotary pair."""
    return (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def rotary_queries(series: tuple[Floats, Floats], head_dim: int) -> tuple[Floats, Floats]:
    """Constant q and k of one head, before rotation (halves convention), whose score follows the series."""
    a, b = series
    q = np.concatenate([a, -b]) * np.float32(head_dim**0.5)
    k = np.concatenate([np.ones_like(a), np.zeros_like(a)])
    even = np.float32((np.linalg.norm(q) / np.linalg.norm(k)) ** 0.5)
    return q / even, k * even


def learned_frequencies(head_dim: int) -> Floats:
    """Frequencies of the learned positions: wavelengths from 4 tokens to beyond the context."""
    return (2 * np.pi / np.geomspace(4, 5000, min(24, head_dim // 2))).astype(np.float32)


def learned_positions(frequencies: Floats, positions: int) -> Floats:
    """`[positions, 2 * n]`: the cosines, then the sines."""
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def learned_queries(series: tuple[Floats, Floats], head_dim: int) -> tuple[Floats, Floats]:
    """Matrices `[head_dim, 2 * n]` that make q and k of one head from the cosines and sines."""
    a, b = series
    n = len(a)
    q, k = np.zeros((2, head_dim, 2 * n), dtype=np.float32)
    q[:n, :n], q[:n, n:] = np.diag(a), np.diag(b)
    q[n : 2 * n, n:], q[n : 2 * n, :n] = np.diag(a), np.diag(-b)
    k[: 2 * n] = np.eye(2 * n)
    q *= np.float32(head_dim**0.5)
    even = np.float32((np.linalg.norm(q) / np.linalg.norm(k)) ** 0.5)
    return q / even, k * even
