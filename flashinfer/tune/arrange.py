"""Which neuron order and record size a layer should have: tokens replayed through the runtime's own cache and planner.

What is replayed decides, not how alike neighbours are: extents, bytes and predicted seconds of a token. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.cache import WindowCache
from flashinfer.config import STORE_ALIGNMENT, CacheConfig, IoConfig, RunConfig
from flashinfer.io import RecordPlan, cheapest, group_tiles, plan_records
from flashinfer.model.weights import decode_tiles
from flashinfer.store.geometry import LARGEST_RECORD, Geometry, round_up
from flashinfer.tune.order import bisected_order, hottest_first, linked_order

Index = npt.NDArray[np.int64]
Masks = npt.NDArray[np.uint8]
BYTES_TOLERANCE = 1.01
"""Where the fewest bytes are wanted, so much more is as good, and the seconds decide."""


@dataclass(frozen=True)
class Conditions:
    """Under which tokens are replayed.

    io: the planner's knobs and the disk. cache: the policy's. slot_bytes: what a layer has for slots; 0: it keeps
    nothing. staging: bytes of one half of the read buffer. alignment: of records, and of reads. warm: tokens at the
    beginning that fill the slots and are not counted.
    """

    io: IoConfig = RunConfig.io
    cache: CacheConfig = RunConfig.cache
    slot_bytes: int = 0
    staging: int = RunConfig.staging
    alignment: int = STORE_ALIGNMENT
    warm: int = 0


@dataclass(frozen=True)
class Traffic:
    """What a token reads of one layer, on average: missing records, extents, their bytes, and predicted seconds."""

    records: float
    extents: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Arrangement:
    """A neuron order (the neuron at each position; None: the original order), a record size, and what they read."""

    order: Index | None
    bundles_per_record: int
    traffic: Traffic


def replay(masks: Masks, geometry: Geometry, conditions: Conditions) -> Traffic:
    """What tokens in a row, one at a time, read of a layer that is stored so.

    Args:
        masks: `[tokens, ceil(neurons / 8)]`, bits of the neurons each token needs, by original index; tokens in a row.
        geometry: of the layer; its record size, order and offset decide.
        conditions: under which; `alignment` is that of reads here.

    Raises:
        ValueError: no token is left after `warm`.
    """
    if len(masks) <= conditions.warm:
        raise ValueError(f"{len(masks)} tokens, of which {conditions.warm} are not counted, leave none")
    records, cache, disk = geometry.records, conditions.cache, conditions.io.disk
    slots = min(records, conditions.slot_bytes // geometry.record_bytes)
    policy = WindowCache(records, slots, window=cache.window, retention=cache.retention)
    policy.preload(np.arange(slots))
    sums = np.zeros(4)
    for i, mask in enumerate(masks):
        neurons = np.flatnonzero(np.unpackbits(mask, count=geometry.neurons))
        missing = policy.step(geometry.records_of(neurons)).misses
        if i < conditions.warm:
            continue
        sums[0] += len(missing)
        for plan in _plans(missing, neurons, geometry, conditions):
            reads, size = len(plan.extents.offsets), plan.extents.total
            sums[1:] += reads, size, disk.seconds(reads, size, min(reads, conditions.io.in_flight))
    return Traffic(*(sums / (len(masks) - conditions.warm)).tolist())


def _plans(missing: Index, neurons: Index, g: Geometry, conditions: Conditions) -> Iterator[RecordPlan]:
    """The reads for the missing records, as `model.neurons` plans them: in several batches where staging is short."""
    io, half = conditions.io, conditions.staging
    knobs = {
        "record_bytes": g.record_bytes, "offset": g.offset, "alignment": conditions.alignment,
        "max_extent": io.max_extent,
    }  # fmt: skip
    plans = [plan_records(missing, **knobs, max_gap=io.max_gap)]
    if plans[0].extents.total > half:
        wanted = [g.records_of(tile[tile >= 0]) for tile in decode_tiles(neurons)]
        held = [np.intersect1d(records, missing, assume_unique=True) for records in wanted]
        plans = [plan for _, _, plan in group_tiles(held, budget=half, **knobs, max_gap=io.max_gap)]
    for plan in plans:
        if not plan.extents.total:
            continue
        if io.objective == "time":
            plan = cheapest(plan, io.disk, in_flight=io.in_flight, budget=half, **knobs)
        yield plan


def record_sizes(bundle_bytes: int, *, neurons: int, alignment: int) -> list[int]:
    """Bundles per record worth a trial: one, and what wastes no more on padding, up to `LARGEST_RECORD`."""
    found, least = [], float("inf")
    for count in range(1, max(1, min(neurons, LARGEST_RECORD // bundle_bytes)) + 1):
        share = round_up(count * bundle_bytes, alignment) / count
        if share <= least:
            least = share
            found.append(count)
    return found


def choose_record_size(
    masks: Masks, order: Index | None, bundle_bytes: int, *, neurons: int, conditions: Conditions
) -> Arrangement:
    """The record size with which these tokens read least, by the objective: bytes, or else seconds.

    Args:
        masks: as in `replay`, of other tokens than the order was learnt from.
        order: the neuron at each position; None: the original order.
        bundle_bytes: of one bundle.
        neurons: of the layer.
        conditions: under which.

    Raises:
        ValueError: as `replay`.
    """
    tried = [
        Arrangement(order, count, replay(masks, _geometry(order, count, bundle_bytes, neurons, conditions), conditions))
        for count in record_sizes(bundle_bytes, neurons=neurons, alignment=conditions.alignment)
    ]
    return least(tried, conditions.io)


def least(tried: list[Arrangement], io: IoConfig) -> Arrangement:
    """The one that reads least by the objective; of equals the first."""
    if io.objective == "bytes":
        fewest = min(a.traffic.bytes for a in tried)
        tried = [a for a in tried if a.traffic.bytes <= fewest * BYTES_TOLERANCE]
    return min(tried, key=lambda a: a.traffic.seconds)


def orders(masks: Masks, bundle_bytes: int, *, neurons: int, io: IoConfig) -> Mapping[str, Index | None]:
    """Orders worth a trial, learnt from these tokens: `original`, `hottest`, `linked`, `bisected`."""
    return {
        "original": None,
        "hottest": hottest_first(masks, neurons),
        "linked": linked_order(masks, neurons),
        "bisected": bisected_order(masks, neurons, bridge=io.disk.break_even_gap // bundle_bytes),
    }


def arrange(
    learn: Masks, judge: Masks, bundle_bytes: int, *, neurons: int, conditions: Conditions
) -> dict[str, Arrangement]:
    """Each order of `orders`, with the record size that suits it, and what it reads; the best is `least` of them.

    Args:
        learn: masks of the tokens the orders are learnt from; a few thousand are enough.
        judge: masks of other, consecutive tokens, which are replayed.
        bundle_bytes: of one bundle.
        neurons: of the layer.
        conditions: under which.

    Raises:
        ValueError: as `replay`, or the masks are not of so many neurons.
    """
    return {
        name: choose_record_size(judge, order, bundle_bytes, neurons=neurons, conditions=conditions)
        for name, order in orders(learn, bundle_bytes, neurons=neurons, io=conditions.io).items()
    }


def _geometry(order: Index | None, count: int, bundle_bytes: int, neurons: int, conditions: Conditions) -> Geometry:
    position_of = None if order is None else np.argsort(order)
    return Geometry(neurons, count, round_up(count * bundle_bytes, conditions.alignment), bundle_bytes, 0, position_of)
