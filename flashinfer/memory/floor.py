"""The floor: what a run takes before it keeps anything it could stream."""

from __future__ import annotations

from dataclasses import replace

from flashinfer.choice import Choice
from flashinfer.config import (
    EXPERT_WORK,
    FILE_ALIGNMENT,
    KV_CODECS,
    LOAD_CHUNK,
    MIN_STAGING,
    TILE_NEURONS,
    TILE_ROWS,
    TILE_TOKENS,
)
from flashinfer.io.plan import worst_case_bytes
from flashinfer.memory.plan import DevicePlan, Mode, Plan, Request
from flashinfer.quant import codec_named
from flashinfer.speed import multiplied
from flashinfer.store import Facts, Manifest
from flashinfer.store.geometry import round_up, tile_records

HALF_SHARE = 64
"""One part in so many of what is free of a device above its floor is for each half that weights come through."""
EXPERT_INDEX = 80
"""Bytes a neuron of a step's experts takes while it is looked for: its number, tile, record and place, some twice."""


def all_matrices(m: Manifest) -> frozenset[str]:
    """Matrices that are multiplied with (tables that are only looked up aside)."""
    return frozenset(multiplied(m))


def needs_all(m: Manifest, choice: Choice, mode: Mode) -> bool:
    """Whether every step needs every neuron, which makes them streamable beforehand."""
    return mode == "naive" or not choice.selects(m.facts)


def least_plan(m: Manifest, r: Request, *, streams: bool) -> Plan:
    """The plan that keeps nothing it could stream, with the smallest buffers; its total is the floor. Where it
    may not stream what is known beforehand, it has no buffers for that. What arithmetic needs lies
    on the device, if there is one."""
    f, device = m.facts, least_device_plan(m, r)
    vectors, scratch, kv_cache = (_vectors(m), _scratch(m, r), _kv_cache(f, r)) if device is None else (0, 0, 0)
    tile = max(_worst_tile_bytes(m, r.alignment), MIN_STAGING)
    block = max(round_up(_largest_block(m), FILE_ALIGNMENT) + 2 * r.alignment, MIN_STAGING)
    neuron_staging = 0 if needs_all(m, r.choice, r.mode) else tile
    piece = 0 if not streams else max(block, tile) if needs_all(m, r.choice, r.mode) else block
    bundle = max(layer.bundle_bytes for layer in m.layers)
    lookup = TILE_TOKENS * (12 * max(f.embed_size, f.hidden_size) + 2 * r.alignment)
    return Plan(
        cap=r.cap.memory if r.cap.memory is not None else r.cap.weight_memory or 0,
        cap_kind="memory" if r.cap.memory is not None else "weight-memory",
        context=r.context,
        weight_vectors=vectors,
        weight_resident=0,
        weight_slots=0,
        weight_staging=2 * (neuron_staging + piece) + (0 if device is None else LOAD_CHUNK + r.run.io.bounce),
        weight_scratch=scratch + lookup + round_up(bundle, FILE_ALIGNMENT),
        baseline=r.baseline + r.footprint.growth,
        kv_cache=kv_cache,
        activations=_activations(m, r),
        bookkeeping=_bookkeeping(m, r),
        neuron_staging=neuron_staging,
        ring=2 * piece,
        piece=piece,
        resident=frozenset(),
        slots=(0,) * len(m.layers),
        kv_type=r.run.kv_type,
        weight_adapter=r.adapter.bytes,
        device=device,
    )


def least_device_plan(m: Manifest, r: Request) -> DevicePlan | None:
    """What a device takes before it keeps any matrix: where arithmetic has its memory, and two halves through which
    weights come. None without a device."""
    if r.device is None:
        return None
    bundle = max(layer.bundle_bytes for layer in m.layers)
    record = max(layer.record_bytes for layer in m.layers)
    half = round_up(max(_largest_block(m), TILE_NEURONS * bundle, record, MIN_STAGING), FILE_ALIGNMENT)
    padding = round_up(bundle, FILE_ALIGNMENT)
    least = DevicePlan(
        cap=r.device.cap,
        overhead=r.device.overhead,
        kv_cache=_kv_cache(m.facts, r),
        activations=_activations(m, r),
        weight_vectors=_vectors(m),
        weight_adapter=r.adapter.bytes,
        weight_scratch=_scratch(m, r),
        weight_staging=2 * half + padding,
        bookkeeping=_device_tables(m, r),
        half=half,
        slots=(0,) * len(m.layers),
    )
    wanted = max(half, min(r.run.staging, half + max(0, least.cap - least.total) // HALF_SHARE))
    half = wanted // FILE_ALIGNMENT * FILE_ALIGNMENT
    return replace(least, weight_staging=2 * half + padding, half=half)


def _vectors(m: Manifest) -> int:
    return sum(t.bytes for t in m.tensors.values() if len(t.shape) == 1)


def _largest_block(m: Manifest) -> int:
    """Bytes of the widest matrix's rows that are computed together."""
    return max(min(TILE_ROWS, t.shape[0]) * t.bytes // t.shape[0] for t in m.tensors.values() if len(t.shape) == 2)


def _scratch(m: Manifest, r: Request) -> int:
    """Bytes of weights in another form, all threads together."""
    widest = max(m.tensors[name].shape[1] for name in all_matrices(m))
    bundle = max(layer.bundle_bytes for layer in m.layers)
    values = max(sum(p.elements for p in layer.parts) for layer in m.layers)
    return r.threads * r.footprint.weights(max(widest, r.adapter.rank), max(values, r.adapter.rank), bundle)


def _kv_cache(f: Facts, r: Request) -> int:
    """Bytes of the keys and values of one session."""
    rows = f.num_layers * f.num_kv_heads * round_up(r.context, r.footprint.kv_unit)
    codec = codec_named(KV_CODECS[r.run.kv_type])
    return rows * (codec.row_bytes(f.head_dim) + codec.row_bytes(f.value_dim))


def _activations(m: Manifest, r: Request) -> int:
    """Bytes of the widest moment of a prompt chunk, attention scores and rotary tables included."""
    f = m.facts
    chunk = round_up(min(r.run.prefill_chunk, r.context), TILE_TOKENS) + TILE_TOKENS
    width = (
        (10 + f.parallel + r.footprint.outputs(r.threads)) * f.hidden_size
        + 4 * f.num_heads * f.head_dim
        + (0 if f.latent is None else 2 * f.num_heads * f.head_dim + 2 * (f.latent.kv_rank + (f.latent.q_rank or 0)))
        + (5 * f.intermediate_size if any(layer.experts is None for layer in m.layers) else 0)
        + (0 if f.experts is None else 2 * f.hidden_size)
        + r.adapter.values
    )
    rope = round_up(r.context, TILE_TOKENS) * sum(
        rope.rotary_dim for rope in (f.rope, f.local_rope) if rope is not None
    )
    experts = 0 if f.experts is None else 2 * EXPERT_WORK + 16 * chunk * (f.experts.columns + TILE_ROWS + TILE_NEURONS)
    logits = 3 * f.vocab_size + r.adapter.logits
    return experts + 4 * (chunk * width + rope + logits) + r.footprint.scores(f, r.context, r.threads)


def _bookkeeping(m: Manifest, r: Request) -> int:
    """Bytes of the tables that say where each record is: slot, score, stamp and candidates for eviction, the
    window's active sets, and the permutation; of experts also where the neurons of a step are."""
    per_record = 48 + 8 * r.run.cache.window
    step = max(EXPERT_INDEX * n.neurons if n.experts is not None else 0 for n in m.layers)
    if needs_all(m, r.choice, r.mode):
        return sum(24 * n.neurons for n in m.layers)  # where each of them lies, and in what
    tables = sum(per_record * n.records + (8 * n.neurons if n.permutation is not None else 0) for n in m.layers)
    return tables + step


def _device_tables(m: Manifest, r: Request) -> int:
    """The same of a device, which has them where it says who is needed; of experts the host does."""
    if needs_all(m, r.choice, r.mode) or r.mode != "cached":
        return 0
    layers = [(n.records, n.neurons) for n in m.layers if n.experts is None]
    return r.footprint.tables(layers, r.run.cache.window)


def _worst_tile_bytes(m: Manifest, alignment: int) -> int:
    """Bytes one half of the neuron read buffer needs at the least: one tile's records, each read alone."""
    return max(
        worst_case_bytes(
            tile_records(n.bundles_per_record, n.records, together=n.experts is not None), n.record_bytes, alignment
        )
        for n in m.layers
    )
