"""The budget resolver: from a cap to a frozen plan of every byte. Pure."""

from __future__ import annotations

from dataclasses import replace

from flashinfer.config import FILE_ALIGNMENT, DiskCurve, Rates
from flashinfer.errors import CapTooSmallError
from flashinfer.firing import firing_of
from flashinfer.memory.device import check_device_floor, placements
from flashinfer.memory.floor import all_matrices, least_plan
from flashinfer.memory.plan import Plan, Request
from flashinfer.memory.wants import Steps, choose, dense_area, matrix_wants, price, slot_wants
from flashinfer.speed import Conditions, Cost, step_cost
from flashinfer.store import Manifest
from flashinfer.units import format_size

RING_SHARE = 16
"""One part in so many of what is free above the floor is used to read ahead, up to `RunConfig.ring`."""
GUESS_SHARE = 64
"""One part in so many of what is free above the floor is for each half of the buffer for guesses."""
RING_PIECES = 8
"""Pieces the ring holds at least, where the tiles are not larger."""


def resolve(manifest: Manifest, request: Request) -> Plan:
    """The plan under the cap that is predicted fastest (`speed`).

    Compared are: every matrix kept or some streamed, each with read buffers of every size; the rest of the cap is
    spent by seconds saved per byte. None of these gets slower with a larger cap, so neither does the best of them.

    A device's memory is spent first, in the same way; what it keeps the cap need not hold.

    Raises:
        CapTooSmallError: the cap, or what may be used of a device, lies below the floor, which the error names.
    """
    check_device_floor(manifest, request)
    # the planner's own figures, so that the same cap always gives the same plan
    c = conditions_of(manifest, request, request.run.io.disk, request.run.rates)
    steps: Steps = {}
    starts = [(placed, must) for start, must in _starts(manifest, request) for placed in placements(c, start)]
    spent = [_spend(c, start, must, steps) for start, must in starts]
    plans = [plan for plan in spent if _can_run(c, plan)]
    if plans:
        return min(plans, key=lambda plan: price(c, sum(step_cost(c, plan, 1), Cost())))
    least = least_plan(manifest, request, streams=True)
    raise CapTooSmallError(
        f"a {least.cap_kind} cap of {format_size(least.cap)} is below the floor of {format_size(least.total)} "
        f"({least.total} bytes) for this model{_advice(least)}",
        least.total,
    )


def _can_run(c: Conditions, plan: Plan) -> bool:
    """Whether it keeps the cap, and has buffers for what it does not keep."""
    slots = (a + b for a, b in zip(plan.slots, plan.near, strict=True))
    every = all(count == n.records for count, n in zip(slots, c.manifest.layers, strict=True))
    return plan.total <= plan.cap and (plan.ring > 0 or every or c.selects)


def conditions_of(manifest: Manifest, request: Request, disk: DiskCurve, rates: Rates) -> Conditions:
    """Under which a plan for this request is judged, on such a disk and machine."""
    firing = request.firing or firing_of(manifest, request.choice)
    return Conditions(manifest, request.run, request.alignment, request.mode, disk, rates, firing, request.choice)


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


def _spend(c: Conditions, plan: Plan, must: frozenset[str], steps: Steps) -> Plan:
    """Spend what the plan leaves of the cap: on what must stay (it may exceed the cap), then on wants, by value."""
    m, there = c.manifest, plan.kept
    must = must - there
    free = plan.cap - plan.total - sum(dense_area(m.tensors[name].bytes) for name in must)
    wants = []
    if c.mode != "naive":
        wants = matrix_wants(c, plan, replace(plan, resident=frozenset(m.tensors)), must | there)
    if c.mode == "cached":
        buffers = (plan.neuron_staging, 0, 0) if c.selects else (plan.neuron_staging, plan.piece, plan.ring)
        if (*buffers, plan.near) not in steps:
            steps[*buffers, plan.near] = slot_wants(c, plan)
        wants += steps[*buffers, plan.near]
    chosen = choose(m, wants, free, plan.near)
    resident = must | chosen.resident
    kept = sum(dense_area(m.tensors[name].bytes) for name in resident)
    return replace(plan, weight_resident=kept, weight_slots=chosen.slot_bytes, resident=resident, slots=chosen.slots)
