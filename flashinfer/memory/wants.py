"""What is worth keeping, and the choice among it when there is not room for all. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.memory.floor import all_matrices
from flashinfer.memory.plan import Plan
from flashinfer.speed import TABLES, Conditions, Cost, lookup_cost, matrix_cost, neurons_cost
from flashinfer.store import Manifest
from flashinfer.store.geometry import round_up

SLOT_STEPS = 64
"""Steps in which slots are weighed against matrices."""


@dataclass(frozen=True)
class Want:
    """Something worth keeping: what it saves per token (see `price`) for each byte.

    Slots (role "slots") are wanted in steps, each up to a `share` of every layer's records.
    """

    value: float
    bytes: int
    role: str
    share: float = 0.0


Steps = dict[tuple[object, ...], "list[Want]"]
"""Wants of slots, by all of a plan that their price depends on: the read buffers, and what a device has."""


@dataclass(frozen=True)
class Chosen:
    """What is kept: matrices, and slots by layer with the bytes they take."""

    resident: frozenset[str]
    slots: tuple[int, ...]
    slot_bytes: int


def price(c: Conditions, cost: Cost) -> float:
    """What is to be least, by the objective: seconds, or bytes read."""
    return cost.seconds if c.run.io.objective == "time" else cost.read


def matrix_wants(c: Conditions, bare: Plan, kept: Plan, known: frozenset[str]) -> list[Want]:
    """Every matrix but those known: what a byte of it saves where a plan keeps it, against a bare one."""
    wants, products = [], all_matrices(c.manifest)
    for name, t in c.manifest.tensors.items():
        if len(t.shape) == 2 and name not in known:
            costs = [lookup_cost(c, name, p, 1) if name in TABLES else Cost() for p in (bare, kept)]
            if name in products:
                costs = [cost + matrix_cost(c, name, p, 1) for cost, p in zip(costs, (bare, kept), strict=True)]
            size = dense_area(t.bytes)
            wants.append(Want((price(c, costs[0]) - price(c, costs[1])) / size, size, name))
    return wants


def choose(m: Manifest, wants: Iterable[Want], free: int, near: tuple[int, ...] | None = None) -> Chosen:
    """As much of what is wanted as fits, by value. near: slots of each layer that there are already."""
    near = near or (0,) * len(m.layers)
    resident: set[str] = set()
    slots, slot_bytes = (0,) * len(m.layers), 0
    for want in sorted(wants, key=lambda w: (-w.value, w.bytes, w.role)) if free > 0 else ():
        if want.role == "slots":
            wanted, before = _share_of(m, want.share, near), slot_bytes
            slots = _slots_for(m, free + slot_bytes, wanted)
            slot_bytes = sum(slot_area(n, layer.record_bytes) for n, layer in zip(slots, m.layers, strict=True))
            free += before - slot_bytes
            if slots != wanted:
                break  # crumbs between slots, which a larger cap would not have: nothing may depend on them
        elif want.bytes <= free:
            resident.add(want.role)
            free -= want.bytes
    return Chosen(frozenset(resident), slots, slot_bytes)


def slot_wants(c: Conditions, plan: Plan, *, near: bool = False) -> list[Want]:
    """Slots in steps of falling value: the concave hull of what they save, so that no step waits for a better one.

    near: of a device, taken from those the plan has; else of DRAM, beyond those that the plan's device has.
    """
    m, total = c.manifest, sum(layer.bytes for layer in c.manifest.layers)
    most = max(layer.records for layer in m.layers)
    shares = sorted({math.ceil(most * i / SLOT_STEPS) / most for i in range(SLOT_STEPS + 1)})
    took = {share: _slots_price(c, share, plan, near) for share in shares}

    def slope(a: float, b: float) -> float:
        return (took[a] - took[b]) / ((b - a) * total)

    hull: list[float] = []
    for share in shares:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], share):
            hull.pop()
        hull.append(share)
    return [Want(slope(a, b), int(total * b), "slots", b) for a, b in pairwise(hull)]


def _slots_price(c: Conditions, share: float, plan: Plan, near: bool) -> float:
    """What the neurons of all layers take with that share of their records in slots."""
    slots = _share_of(c.manifest, share, (0,) * len(plan.slots))
    seen: dict[tuple[object, ...], float] = {}
    total = 0.0
    for i, (n, count) in enumerate(zip(c.manifest.layers, slots, strict=True)):
        there = count if near else plan.near[i]
        far = max(0, (plan.slots[i] if near else count) - there)
        key = (n.records, n.record_bytes, there, far, c.firing[i])  # most models have many layers alike
        if key not in seen:
            seen[key] = price(c, neurons_cost(c, i, far, plan, 1, there))
        total += seen[key]
    return total


def dense_area(size: int) -> int:
    """DRAM of a resident matrix: direct reads fill whole file-alignment units."""
    return round_up(size, FILE_ALIGNMENT) + FILE_ALIGNMENT


def slot_area(slots: int, record_bytes: int) -> int:
    """Bytes of so many slots of a layer."""
    return round_up(slots * record_bytes, FILE_ALIGNMENT)


def _share_of(m: Manifest, share: float, near: tuple[int, ...]) -> tuple[int, ...]:
    """That share of every layer's records, but for those near."""
    wanted = (min(layer.records, math.ceil(layer.records * share)) for layer in m.layers)
    return tuple(max(0, count - there) for count, there in zip(wanted, near, strict=True))


def _slots_for(m: Manifest, free: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Slots per layer within `free` bytes: the same share of every layer's records, at most what is wanted."""
    if sum(slot_area(n, layer.record_bytes) for n, layer in zip(wanted, m.layers, strict=True)) <= free:
        return wanted
    usable = max(0, free - len(m.layers) * FILE_ALIGNMENT)
    share = usable / sum(layer.bytes for layer in m.layers)
    return tuple(min(n, int(layer.records * share)) for n, layer in zip(wanted, m.layers, strict=True))
