"""What the backends keep in memory beside what they are handed: pure, for the budget resolver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashinfer.config import TILE_KEYS, TILE_NEURONS, TILE_ROWS, TILE_TOKENS
from flashinfer.quant.int8g32 import BLOCK
from flashinfer.store.facts import Facts
from flashinfer.store.geometry import round_up
from flashinfer.units import MIB


@dataclass(frozen=True)
class Footprint:
    """Bytes, as functions of a model's dimensions.

    kv_unit: keys and values are kept for a multiple of so many positions.
    weights: per thread, of weights in another form: (longest row, values of a bundle, bytes of a bundle).
    scores: of attention, and activations prepared for products, all threads together: (facts, context, threads).
    tables: of the bookkeeping that is kept on a device: (records and neurons of each layer, tokens of the window).
    outputs: float32 rows of the hidden size that a step's feed-forward takes per token: (threads).
    growth: allowance for what the process and its libraries allocate once the baseline was measured.
    """

    kv_unit: int
    weights: Callable[[int, int, int], int]
    scores: Callable[[Facts, int, int], int]
    tables: Callable[[Sequence[tuple[int, int]], int], int]
    outputs: Callable[[int], int]
    growth: int


TASK_TOKENS = 8
"""Queries of one attention task of the native backend in prefill (`TOKENS` in native/engine.cpp)."""


def native_scores(f: Facts, context: int) -> int:
    """Scores and sums one thread of the native backend keeps at most."""
    group = f.num_heads // f.num_kv_heads
    values = round_up(context, TILE_TOKENS) + f.head_dim + f.value_dim + 1
    return 4 * group * max(1, TASK_TOKENS // group) * values


UNPACK_PARTS = 8
"""Torch decodes a tile of codes in so many parts."""
UNPACK_BYTES = 12
"""Bytes for each of a part's values: its code, twice, as an index, and its scale."""
PREPARED_TOKENS = 64
"""Tokens that the native backend prepares together for products with codes (`native/work.hpp`)."""


def native_prepared(widest: int) -> int:
    """What it keeps of them at most: four bytes for each value in whole blocks of 128, sums, and a line."""
    return PREPARED_TOKENS * (5 * round_up(widest, 128) + 128)


def torch_weights(widest: int, values: int, bundle: int) -> int:
    """Scratch of one thread of torch: a tile of a matrix or of neurons in float32, its scales where it is int8g32 or,
    of codes, what a part of it takes on its way; and the bytes of a tile's bundles. `decide` stays within it: a tile
    of a matrix, from TILE_NEURONS bundles at a time."""
    tile = max(TILE_ROWS * widest, TILE_NEURONS * values)
    scales = -(-tile // BLOCK) + TILE_ROWS
    return 4 * tile + max(4 * scales, UNPACK_BYTES * -(-tile // UNPACK_PARTS)) + TILE_NEURONS * bundle


TABLE_RECORD, TABLE_NEURON, TABLE_LAYER = 80, 40, 16 * 1024
"""Bytes of `torch_tiers.TensorTiers` for each record and neuron, and of each layer."""
STEP_RECORD = 200
"""Bytes that a step of it takes meanwhile for each record."""


def torch_tables(layers: Sequence[tuple[int, int]], window: int) -> int:
    """Of all layers, and one step at a time."""
    kept = sum((TABLE_RECORD + window) * records + TABLE_NEURON * neurons + TABLE_LAYER for records, neurons in layers)
    return kept + max((STEP_RECORD * records for records, _ in layers), default=0)


NATIVE_GROWTH = 8 * MIB
"""Stacks, small objects, modules imported later, pages of libraries touched later. In 102 runs (1 to 4 threads, prompts
of 5 to 1760 tokens, models of 10 to 150 MB, f32 and f16 keys, with a trace and without) the peak was 2 to 18 MiB below
the plan without this allowance, because its activations are an upper bound; the rest is margin, and room for the
kernel's own memory, which a cgroup counts and a resident size does not."""
TORCH_GROWTH = 32 * MIB
"""Pools of its threads, code that is loaded when it is first used: up to 15 MiB beyond the plan in 6 runs."""
NATIVE = Footprint(
    kv_unit=TILE_TOKENS,
    weights=lambda widest, values, bundle: 0,
    scores=lambda f, context, threads: (
        threads * native_scores(f, context)
        + native_prepared(max(f.hidden_size, f.embed_size, f.num_heads * max(f.head_dim, f.value_dim)))
    ),
    tables=lambda layers, window: 0,
    outputs=lambda threads: 0,
    growth=NATIVE_GROWTH,
)
TORCH = Footprint(
    kv_unit=TILE_KEYS,
    weights=torch_weights,
    scores=lambda f, context, threads: 16 * f.num_heads * TILE_TOKENS * round_up(context, TILE_KEYS),
    tables=torch_tables,
    outputs=lambda threads: 2 * threads,  # each thread holds the output of an FFN tile, and its pieces
    growth=TORCH_GROWTH,
)
