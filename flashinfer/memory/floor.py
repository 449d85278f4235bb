"""The floor: what a run takes before it keeps anything it could stream."""

from __future__ import annotations

from flashinfer.config import (
    COPY_RECORDS,
    FILE_ALIGNMENT,
    MIN_STAGING,
    TILE_KEYS,
    TILE_NEURONS,
    TILE_ROWS,
    TILE_TOKENS,
)
from flashinfer.io.plan import worst_case_bytes
from flashinfer.memory.plan import Plan, Request
from flashinfer.speed import multiplied
from flashinfer.store import Facts, Manifest
from flashinfer.store.geometry import round_up
from flashinfer.units import MIB

LIBRARY_GROWTH = 32 * MIB
"""Allowance for what libraries allocate after the baseline was measured: stacks, pools, tokenizer tables. Growth
beyond the other parts was at most 12 MiB in 13 runs with 1 to 8 threads."""


def all_matrices(m: Manifest) -> frozenset[str]:
    """Matrices that are multiplied with (tables that are only looked up aside)."""
    return frozenset(multiplied(m))


def least_plan(m: Manifest, r: Request, *, streams_dense: bool) -> Plan:
    """The plan that keeps nothing it could stream, with the smallest buffers. Its total is the floor."""
    f = m.facts
    vectors = sum(t.bytes for t in m.tensors.values() if len(t.shape) == 1)
    widest = max(t.shape[1] for name, t in m.tensors.items() if name in all_matrices(m))
    record = max(layer.record_bytes for layer in m.layers)
    neuron_staging = max(_worst_tile_bytes(m, r.alignment), MIN_STAGING)
    block = max(TILE_ROWS * t.bytes // t.shape[0] for t in m.tensors.values() if len(t.shape) == 2)
    dense_staging = max(round_up(block, FILE_ALIGNMENT) + 2 * r.alignment, MIN_STAGING) if streams_dense else 0
    bundle = max(layer.bundle_bytes for layer in m.layers)
    values = max(sum(p.elements for p in layer.parts) for layer in m.layers)
    per_thread = 4 * max(TILE_ROWS * widest, TILE_NEURONS * values) + TILE_NEURONS * bundle
    lookup = TILE_TOKENS * (12 * max(f.embed_size, f.hidden_size) + 2 * r.alignment)
    return Plan(
        cap=r.cap.memory if r.cap.memory is not None else r.cap.weight_memory or 0,
        cap_kind="memory" if r.cap.memory is not None else "weight-memory",
        context=r.context,
        weight_vectors=vectors,
        weight_resident=0,
        weight_slots=0,
        weight_staging=2 * (neuron_staging + dense_staging),
        weight_scratch=r.threads * per_thread + COPY_RECORDS * record + lookup + round_up(bundle, FILE_ALIGNMENT),
        baseline=r.baseline + LIBRARY_GROWTH,
        kv_cache=8 * f.num_layers * f.num_kv_heads * f.head_dim * round_up(r.context, TILE_KEYS),
        activations=_activations(f, r),
        bookkeeping=_bookkeeping(m, r),
        neuron_staging=neuron_staging,
        dense_staging=dense_staging,
        resident=frozenset(),
        slots=(0,) * len(m.layers),
    )


def _activations(f: Facts, r: Request) -> int:
    """Bytes of the widest moment of a prompt chunk, attention scores and rotary tables included."""
    chunk = round_up(r.run.prefill_chunk, TILE_TOKENS) + TILE_TOKENS
    outputs = (10 + 2 * r.threads) * f.hidden_size  # each thread holds the output of an FFN tile, and its pieces
    width = outputs + 4 * f.num_heads * f.head_dim + 5 * f.intermediate_size
    scores = 4 * f.num_heads * TILE_TOKENS * round_up(r.context, TILE_KEYS)
    rope = 0 if f.rope is None else round_up(r.context, TILE_TOKENS) * f.rope.rotary_dim
    return 4 * (chunk * width + scores + rope + 3 * f.vocab_size)


def _bookkeeping(m: Manifest, r: Request) -> int:
    """Bytes of the tables that say where each record is: slot, score, stamp and candidates for eviction, the
    window's active sets, and the permutation."""
    per_record = 48 + 8 * r.run.cache.window
    return sum(per_record * n.records + (8 * n.neurons if n.permutation is not None else 0) for n in m.layers)


def _worst_tile_bytes(m: Manifest, alignment: int) -> int:
    """Bytes one half of the neuron read buffer needs at the least: one tile's records, each read alone."""
    return max(worst_case_bytes(min(TILE_NEURONS, n.records), n.record_bytes, alignment) for n in m.layers)
