"""What the backends keep in memory beside what they are handed: pure, for the budget resolver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashinfer.config import TILE_KEYS, TILE_NEURONS, TILE_ROWS, TILE_TOKENS
from flashinfer.store.facts import Facts
from flashinfer.store.geometry import round_up


@dataclass(frozen=True)
class Footprint:
    """Bytes, as functions of a model's dimensions.

    kv_unit: keys and values are kept for a multiple of so many positions.
    weights: per thread, of weights in another form: (longest row, values of a bundle, bytes of a bundle).
    scores: of attention, all threads together: (facts, context, threads).
    outputs: float32 rows of the hidden size that a step's feed-forward takes per token: (threads).
    """

    kv_unit: int
    weights: Callable[[int, int, int], int]
    scores: Callable[[Facts, int, int], int]
    outputs: Callable[[int], int]


TASK_TOKENS = 8
"""Queries of one attention task of the native backend in prefill (`TOKENS` in native/engine.cpp)."""


def native_scores(heads: int, kv_heads: int, head_dim: int, context: int) -> int:
    """Scores and sums one thread of the native backend keeps at most."""
    group = heads // kv_heads
    return 4 * group * max(1, TASK_TOKENS // group) * (round_up(context, TILE_TOKENS) + 2 * head_dim + 1)


NATIVE = Footprint(
    kv_unit=TILE_TOKENS,
    weights=lambda widest, values, bundle: 0,
    scores=lambda f, context, threads: threads * native_scores(f.num_heads, f.num_kv_heads, f.head_dim, context),
    outputs=lambda threads: 0,
)
TORCH = Footprint(
    kv_unit=TILE_KEYS,
    weights=lambda widest, values, bundle: 4 * max(TILE_ROWS * widest, TILE_NEURONS * values) + TILE_NEURONS * bundle,
    scores=lambda f, context, threads: 16 * f.num_heads * TILE_TOKENS * round_up(context, TILE_KEYS),
    outputs=lambda threads: 2 * threads,  # each thread holds the output of an FFN tile, and its pieces
)
