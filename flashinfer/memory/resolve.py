"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from flashinfer.config import FILE_ALIGNMENT, DiskCurve, Rates
from flashinfer.errors import CapTooSmallError
from flashinfer.firing import firing_of
from flashinfer.memory.floor import all_matrices, least_plan
from flashinfer.memory.plan import Plan, Request
from flashinfer.speed import (
    TABLES,
    Conditions,
    Cost,
    lookup_cost,
    matrix_cost,
    neurons_cost,
    step_cost,
)
from flashinfer.store import Manifest
from flashinfer.store.geometry import round_up
from flashinfer.units import format_size

RING_SHARE = 16
"""One part in so many of what is free above the floor is used to read ahead, up to `RunConfig.ring`."""
GUESS_SHARE = 64
"""One part in so many of what is free above the floor is for each half of the buffer for guesses."""
RING_PIECES = 8
"""Pieces the ring holds at least, where the tiles are not larger."""
SLOT_STEPS = 64
"""Steps in which slots are weighed against matrices."""


@dataclass(frozen=True)
class _Want:
    """Something worth keeping in DRAM: what it saves per token (see `_price`) for each byte.

    Slots (role "slots") are wanted in steps, each up to a `share` of every layer's records.
    """

    value: float
    bytes: int
    role: str
    share: float = 0.0


_Steps = dict[tuple[int, int, int], "list[_Want]"]
"""Wants of slots, by all of a plan that their price depends on: the read buffers."""


def resolve(manifest: Manifest, request: Request) -> Plan:
    """The plan under the cap that is predicted fastest (`speed`).

    Compared are: every matrix kept or some streamed, each with read buffers of every size; the rest of the cap is
    spent by seconds saved per byte. None of these gets slower with a larger cap, so neither does the best of them.

    Raises:
        CapTooSmallError: the cap lies below the floor, which the error names.
    """
    # the planner's own figures, so that the same cap always gives the same plan
    c = conditions_of(manifest, request, request.run.io.disk, request.run.rates)
    steps: _Steps = {}
    plans = [plan for start, must in _starts(manifest, request) if _can_run(c, plan := _spend(c, start, must, steps))]
    if plans:
        return min(plans, key=lambda plan: _price(c, sum(step_cost(c, plan, 1), Cost())))
    least = least_plan(manifest, request, streams=True)
    raise CapTooSmallError(
        f"a {least.cap_kind} cap of {format_size(least.cap)} is below the floor of {format_size(least.total)} "
        f"({least.total} bytes) for this model{_advice(least)}",
        least.total,
    )


def _can_run(c: Conditions, plan: Plan) -> bool:
    """Whether it keeps the cap, and has buffers for what it does not keep."""
    every = all(slots == n.records for slots, n in zip(plan.slots, c.manifest.layers, strict=True))
    return plan.total <= plan.cap and (plan.ring > 0 or every or c.selects)


def conditions_of(manifest: Manifest, request: Request, disk: DiskCurve, rates: Rates) -> Conditions:
    """Under which a plan for this request is judged, on such a disk and machine."""
    firing = request.firing or firing_of(manifest, request.choice)
    return Conditions(manifest, request.run, request.alignment, request.mode, disk, rates, firing, request.choice)


def _price(c: Conditions, cost: Cost) -> float:
    """What is to be least, by the objective: seconds, or bytes read."""
    return cost.seconds if c.run.io.objective == "time" else cost.read


def _starts(m: Manifest, r: Request) -> list[tuple[Plan, frozenset[str]]]:
    """Plans that keep nothing yet, and what each must keep. Of equals the first counts: no stream, large buffers."""
    starts = []
    for streams in (True,) if r.mode == "naive" else (False, True):
        least, must = least_plan(m, r, streams=streams), frozenset() if streams else all_matrices(m)
        least = _with_guesses(least, r)
        for plan in _with_rings(least, r) if streams else [least]:
            for half in _halvings(r.run.staging, plan.neuron_staging):
                staging = plan.weight_staging + 2 * (half - plan.neuron_staging)
                starts.append((replace(plan, neuron_staging=half, weight_staging=staging), must))
    return starts


def _halvings(largest: int, least: int) -> list[int]:
    """Sizes of a buffer to choose from, falling: the same at every cap."""
    sizes = []
    while largest > least > 0:
        sizes.append(largest // FILE_ALIGNMENT * FILE_ALIGNMENT)
        largest //= 2
    return [*(size for size in sizes if size > least), least]


def _with_guesses(least: Plan, r: Request) -> Plan:
    """A share of what the cap leaves is for guesses about the next layer, where these are made."""
    wanted = r.choice.kind == "low-rank" if r.run.lookahead is None else r.run.lookahead
    if not wanted or r.mode != "cached" or r.choice.kind not in ("low-rank", "certified", "router"):
        return least
    free = max(0, least.cap - least.total)
    half = min(r.run.guess, free // GUESS_SHARE) // FILE_ALIGNMENT * FILE_ALIGNMENT
    return replace(least, guess=half, weight_staging=least.weight_staging + 2 * half)


def _with_rings(least: Plan, r: Request) -> list[Plan]:
    """A share of what the cap leaves goes to reading ahead, so that the disk works on while layers are computed; in
    pieces of any size of which the ring holds some."""
    free = max(0, least.cap - least.total)
    ring = min(max(r.run.ring, least.ring), least.ring + free // RING_SHARE) // FILE_ALIGNMENT * FILE_ALIGNMENT
    ring = max(ring, least.ring)
    staging = least.weight_staging + ring - least.ring
    edges = 2 * FILE_ALIGNMENT  # what reading a whole number of row tiles is widened by at most
    sizes = [size for size in _halvings(r.run.staging, least.piece)[:-1] if RING_PIECES * size <= ring]
    pieces = [*(size + edges for size in sizes), least.piece]
    return [replace(least, ring=ring, piece=piece, weight_staging=staging) for piece in pieces]


def _advice(least: Plan) -> str:
    if least.cap_kind == "memory" and least.kv_cache > least.total // 4:
        return f"; raise the cap, or lower --context (now {least.context})"
    return "; raise the cap"


def _spend(c: Conditions, plan: Plan, must: frozenset[str], steps: _Steps) -> Plan:
    """Spend what the plan leaves of the cap: on what must stay (it may exceed the cap), then on wants, by value."""
    m, resident = c.manifest, set(must)
    free = plan.cap - plan.total - sum(_dense_area(m.tensors[name].bytes) for name in must)
    slots, slot_bytes = plan.slots, 0
    for want in sorted(_wants(c, plan, must, steps), key=lambda w: (-w.value, w.bytes, w.role)) if free > 0 else ():
        if want.role == "slots":
            slots, before = _slots_for(m, free + slot_bytes, want.share), slot_bytes
            slot_bytes = sum(_slot_area(n, layer.record_bytes) for n, layer in zip(slots, m.layers, strict=True))
            free += before - slot_bytes
            if slots != _share_of(m, want.share):
                break  # crumbs between slots, which a larger cap would not have: nothing may depend on them
        elif want.bytes <= free:
            resident.add(want.role)
            free -= want.bytes
    kept = sum(_dense_area(m.tensors[name].bytes) for name in resident)
    return replace(plan, weight_resident=kept, weight_slots=slot_bytes, resident=frozenset(resident), slots=slots)


def _wants(c: Conditions, plan: Plan, must: frozenset[str], steps: _Steps) -> list[_Want]:
    """Everything that could be resident, with what a byte of it saves; nothing for the mode that keeps nothing."""
    if c.mode == "naive":
        return []
    m, products = c.manifest, all_matrices(c.manifest)
    kept = replace(plan, resident=frozenset(m.tensors))
    wants = []
    for name, t in m.tensors.items():
        if len(t.shape) == 2 and name not in must:
            costs = [lookup_cost(c, name, p, 1) if name in TABLES else Cost() for p in (plan, kept)]
            if name in products:
                costs = [cost + matrix_cost(c, name, p, 1) for cost, p in zip(costs, (plan, kept), strict=True)]
            size = _dense_area(t.bytes)
            wants.append(_Want((_price(c, costs[0]) - _price(c, costs[1])) / size, size, name))
    if c.mode == "cached":
        buffers = (plan.neuron_staging, 0, 0) if c.selects else (plan.neuron_staging, plan.piece, plan.ring)
        if buffers not in steps:
            steps[buffers] = _slot_wants(c, plan)
        wants += steps[buffers]
    return wants


def _slot_wants(c: Conditions, plan: Plan) -> list[_Want]:
    """Slots in steps of falling value: the concave hull of what they save, so that no step waits for a better one."""
    m, total = c.manifest, sum(layer.bytes for layer in c.manifest.layers)
    most = max(layer.records for layer in m.layers)
    shares = sorted({math.ceil(most * i / SLOT_STEPS) / most for i in range(SLOT_STEPS + 1)})
    price = {share: _slots_price(c, share, plan) for share in shares}

    def slope(a: float, b: float) -> float:
        return (price[a] - price[b]) / ((b - a) * total)

    hull: list[float] = []
    for share in shares:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], share):
            hull.pop()
        hull.append(share)
    return [_Want(slope(a, b), int(total * b), "slots", b) for a, b in pairwise(hull)]


def _slots_price(c: Conditions, share: float, plan: Plan) -> float:
    """What the neurons of all layers take with that share of their records in slots."""
    slots = _share_of(c.manifest, share)
    seen: dict[tuple[object, ...], float] = {}
    total = 0.0
    for i, (n, count) in enumerate(zip(c.manifest.layers, slots, strict=True)):
        key = (n.records, n.record_bytes, count, c.firing[i])  # most models have many layers alike
        if key not in seen:
            seen[key] = _price(c, neurons_cost(c, i, count, plan, 1))
        total += seen[key]
    return total


def _dense_area(size: int) -> int:
    """DRAM of a resident matrix: direct reads fill whole file-alignment units."""
    return round_up(size, FILE_ALIGNMENT) + FILE_ALIGNMENT


def _slot_area(slots: int, record_bytes: int) -> int:
    return round_up(slots * record_bytes, FILE_ALIGNMENT)


def _share_of(m: Manifest, share: float) -> tuple[int, ...]:
    """That share of every layer's records."""
    return tuple(min(layer.records, math.ceil(layer.records * share)) for layer in m.layers)


def _slots_for(m: Manifest, free: int, most: float) -> tuple[int, ...]:
    """Slots per layer within `free` bytes: the same share of every layer's records, at most `most`."""
    wanted = _share_of(m, most)
    if sum(_slot_area(n, layer.record_bytes) for n, layer in zip(wanted, m.layers, strict=True)) <= free:
        return wanted
    usable = max(0, free - len(m.layers) * FILE_ALIGNMENT)
    share = usable / sum(layer.bytes for layer in m.layers)
    return tuple(min(n, int(layer.records * share)) for n, layer in zip(wanted, m.layers, strict=True))
