"""What a device with memory of its own keeps. Pure."""

from __future__ import annotations

from dataclasses import replace

from flashinfer.errors import CapTooSmallError
from flashinfer.memory.floor import least_device_plan
from flashinfer.memory.plan import Plan, Request
from flashinfer.memory.wants import choose, dense_area, matrix_wants, slot_wants
from flashinfer.speed import Conditions
from flashinfer.store import Manifest
from flashinfer.units import format_size


def check_device_floor(manifest: Manifest, request: Request) -> None:
    """What must hold of a device, where there is one.

    Raises:
        CapTooSmallError: what may be used of it lies below its floor, which the error names.
    """
    least = least_device_plan(manifest, request)
    if least is None or least.total <= least.cap:
        return
    context = f", or lower --context (now {request.context})" if least.kv_cache > least.total // 4 else ""
    raise CapTooSmallError(
        f"{format_size(least.cap)} of the device's memory are below the floor of {format_size(least.total)} "
        f"({least.total} bytes) for this model; raise --vram{context}, or use --device cpu",
        least.total,
    )


def placements(c: Conditions, plan: Plan) -> list[Plan]:
    """The plan with its device's memory spent, in the ways that are to be compared: by what a byte saves against
    reading it from flash, and against copying it from DRAM. Without a device the plan as it is."""
    device, m = plan.device, c.manifest
    if device is None or c.mode == "naive":
        return [plan]
    every, records = frozenset(m.tensors), tuple(layer.records for layer in m.layers)
    plans: list[Plan] = []
    there = replace(plan, device=replace(device, resident=every))
    for bare in (plan, replace(plan, resident=every, slots=records)):
        wants = matrix_wants(c, bare, there, frozenset())
        if c.mode == "cached":
            wants += slot_wants(c, bare, near=True)
        chosen = choose(m, [want for want in wants if want.value > 0], device.cap - device.total)
        size = sum(dense_area(m.tensors[name].bytes) for name in chosen.resident)
        placed = replace(
            device, resident=chosen.resident, weight_resident=size, slots=chosen.slots, weight_slots=chosen.slot_bytes
        )
        if all(placed != other.device for other in plans):
            plans.append(replace(plan, device=placed))
    return plans
