"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flashinfer.config import (
    COPY_RECORDS,
    FILE_ALIGNMENT,
    MIN_STAGING,
    TILE_KEYS,
    TILE_NEURONS,
    TILE_ROWS,
    TILE_TOKENS,
    Cap,
    DiskCurve,
    RunConfig,
)
from flashinfer.errors import CapTooSmallError
from flashinfer.io.plan import worst_case_bytes
from flashinfer.store import Facts, Manifest
from flashinfer.store.geometry import ASSUMED_DENSITY, expected_seconds, round_up
from flashinfer.units import MIB, format_size

LIBRARY_GROWTH = 48 * MIB
"""Allowance for what libraries allocate after the baseline was measured: stacks, pools, tokenizer tables."""

Mode = Literal["cached", "always-miss", "naive"]


@dataclass(frozen=True)
class Plan:
    """Where every byte of the cap goes. All sizes in bytes; `total <= cap` always holds.

    `weight_*` fields are DRAM that holds weights in any form; the rest only counts under `--memory`.
    """

    cap: int
    cap_kind: Literal["memory", "weight-memory"]
    context: int
    weight_vectors: int
    weight_resident: int
    weight_slots: int
    weight_staging: int
    weight_scratch: int
    baseline: int
    kv_cache: int
    activations: int
    bookkeeping: int
    neuron_staging: int
    dense_staging: int
    resident: frozenset[str]
    slots: tuple[int, ...]

    @property
    def weight_total(self) -> int:
        """Every DRAM byte that holds a weight: resident, slots, read buffers, converted tiles."""
        parts = (self.weight_vectors, self.weight_resident, self.weight_slots)
        return sum(parts) + self.weight_staging + self.weight_scratch

    @property
    def total(self) -> int:
        """What counts against the cap."""
        if self.cap_kind == "weight-memory":
            return self.weight_total
        return self.weight_total + self.baseline + self.kv_cache + self.activations + self.bookkeeping

    def to_json(self) -> dict[str, Any]:
        """All fields, plain, with the sums."""
        fields = asdict(self) | {"resident": sorted(self.resident), "slots": list(self.slots)}
        return fields | {"weight_total": self.weight_total, "total": self.total}


@dataclass(frozen=True)
class Request:
    """What is asked of the resolver. Exactly one of the cap's two is a number of bytes.

    baseline: resident bytes of the process before any weight is loaded (measured by the caller).
    alignment: the unit of the reader's device.
    """

    context: int
    threads: int
    alignment: int
    baseline: int
    run: RunConfig
    cap: Cap
    mode: Mode = "cached"


@dataclass(frozen=True)
class _Want:
    """Something worth keeping in DRAM: seconds per token it saves for each byte."""

    value: float
    bytes: int
    role: str


def resolve(manifest: Manifest, request: Request) -> Plan:
    """The plan under the cap: first what cannot be left out, then by seconds saved per byte.

    Raises:
        CapTooSmallError: the cap lies below the floor, which the error names.
    """
    for streams_dense in (False, True):
        least = _least(manifest, request, streams_dense=streams_dense)
        # Small read buffers are slow, but not as slow as reading a matrix again for every token: so they are
        # tried before giving up on keeping every matrix.
        for start in (_grow_staging(least, request), least):
            plan = _spend(manifest, request, start)
            if plan.total <= plan.cap and (streams_dense or _all_matrices(manifest) <= plan.resident):
                return plan
    raise CapTooSmallError(
        f"a {least.cap_kind} cap of {format_size(least.cap)} is below the floor of {format_size(least.total)} "
        f"({least.total} bytes) for this model{_advice(least)}",
        least.total,
    )


def _advice(least: Plan) -> str:
    if least.cap_kind == "memory" and least.kv_cache > least.total // 4:
        return f"; raise the cap, or lower --context (now {least.context})"
    return "; raise the cap"


def _all_matrices(m: Manifest) -> frozenset[str]:
    """Matrices that are multiplied with (tables that are only looked up aside)."""
    tables = {"embed.positions"} | (set() if m.facts.tied_head else {"embed.weight"})
    return frozenset(name for name, t in m.tensors.items() if len(t.shape) == 2 and name not in tables)


def _least(m: Manifest, r: Request, *, streams_dense: bool) -> Plan:
    """The plan that keeps nothing it could stream, with the smallest buffers. Its total is the floor."""
    f = m.facts
    vectors = sum(t.bytes for t in m.tensors.values() if len(t.shape) == 1)
    widest = max(t.shape[1] for name, t in m.tensors.items() if name in _all_matrices(m))
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


def _spend(m: Manifest, r: Request, plan: Plan) -> Plan:
    """Spend what the plan leaves of the cap on wants, by value."""
    if r.mode == "naive":
        return plan
    free, resident, slots_at_end = plan.cap - plan.total, set[str](), plan.slots
    slot_bytes = 0
    for want in sorted(_wants(m, r), key=lambda w: (-w.value, w.bytes, w.role)):
        if want.role == "slots":
            slots_at_end = _slots_for(m, free)
            slot_bytes = sum(_slot_area(n, layer.record_bytes) for n, layer in zip(slots_at_end, m.layers, strict=True))
            free -= slot_bytes
        elif want.bytes <= free:
            resident.add(want.role)
            free -= want.bytes
    kept = sum(_dense_area(m.tensors[name].bytes) for name in resident)
    return replace(
        plan, weight_resident=kept, weight_slots=slot_bytes, resident=frozenset(resident), slots=slots_at_end
    )


def _grow_staging(plan: Plan, r: Request) -> Plan:
    """Give each half of the read buffers up to 1/32 of the cap, where that is more than the least."""
    half = min(r.run.staging, plan.cap // 32) // FILE_ALIGNMENT * FILE_ALIGNMENT
    neuron = max(plan.neuron_staging, half)
    dense = max(plan.dense_staging, half) if plan.dense_staging else 0
    grown = replace(plan, neuron_staging=neuron, dense_staging=dense, weight_staging=2 * (neuron + dense))
    return grown if grown.total <= grown.cap else plan


def _wants(m: Manifest, r: Request) -> list[_Want]:
    """Everything that could be resident, with what a byte of it saves."""
    disk = r.run.io.disk if r.run.io.objective == "time" else DiskCurve(0.0, r.run.io.disk.bytes_per_s)
    multiplied = _all_matrices(m)
    wants = []
    for name, t in m.tensors.items():
        if len(t.shape) == 2:
            size = _dense_area(t.bytes)
            row = disk.per_read_s + t.bytes / t.shape[0] / disk.bytes_per_s
            wants.append(_Want(1 / disk.bytes_per_s if name in multiplied else row / size, size, name))
    if r.mode == "cached":
        density = ASSUMED_DENSITY if m.facts.sparse else 1.0
        layer = m.layers[0]
        saved = expected_seconds(layer.bundle_bytes, layer.bundles_per_record, m.alignment, density, disk)
        per_byte = saved / (layer.record_bytes / layer.bundles_per_record)
        wants.append(_Want(per_byte, sum(layer.bytes for layer in m.layers), "slots"))
    return wants


def _dense_area(size: int) -> int:
    """DRAM of a resident matrix: direct reads fill whole file-alignment units."""
    return round_up(size, FILE_ALIGNMENT) + FILE_ALIGNMENT


def _slot_area(slots: int, record_bytes: int) -> int:
    return round_up(slots * record_bytes, FILE_ALIGNMENT)


def _slots_for(m: Manifest, free: int) -> tuple[int, ...]:
    """Slots per layer within `free` bytes: the same share of every layer's records."""
    total = sum(_slot_area(layer.records, layer.record_bytes) for layer in m.layers)
    usable = max(0, free - len(m.layers) * FILE_ALIGNMENT)
    share = 1.0 if total <= free else usable / total
    return tuple(min(layer.records, int(layer.records * share)) for layer in m.layers)
