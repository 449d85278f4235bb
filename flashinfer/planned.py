"""What the planner (`io/plan.py`) will read of a layer's records, on average: bytes and reads. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashinfer.config import TILE_NEURONS
from flashinfer.store import NeuronLayer

if TYPE_CHECKING:
    from flashinfer.speed import Conditions


def run_at_the_end(c: Conditions, n: NeuronLayer, missing: float, piece: int) -> tuple[float, float]:
    """Bytes and reads of that share of a layer's records, in pieces of one run."""
    if missing <= 0.0:
        return 0.0, 0.0
    read = missing * n.records * n.record_bytes
    pieces = max(1.0, read / (piece or n.bytes))
    again = n.record_bytes if TILE_NEURONS % n.bundles_per_record else 0  # a record two pieces share
    read += (pieces - 1) * again + pieces * widening(n.record_bytes, c.alignment)
    return read, max(pieces, read / c.run.io.max_extent)


def neuron_reads(c: Conditions, n: NeuronLayer, missing: float, tiles: float, half: int) -> tuple[float, float]:
    """Bytes and reads of the records missing, a share of the layer, anywhere in it."""
    if missing <= 0.0:
        return 0.0, 0.0
    read, reads = _runs(c, n, missing, c.run.io.max_gap)
    if read > tiles * half:  # where not even a tile fits with its holes, tiles are read one by one without them
        read, reads = _runs(c, n, missing, 0)
    whole = max(1.0, n.bytes / c.run.io.max_extent)
    if c.run.io.objective == "time" and n.bytes <= tiles * half:
        seconds = [c.disk.seconds(r, size, min(c.run.io.in_flight, r)) for size, r in ((read, reads), (n.bytes, whole))]
        if seconds[1] < seconds[0]:
            return n.bytes, whole
    return read, reads


def _runs(c: Conditions, n: NeuronLayer, missing: float, max_gap: int) -> tuple[float, float]:
    """Bytes and reads when each record is missing independently and holes up to `max_gap` are read through.

    A hole of g records comes with probability missing * (1 - missing) ** g.
    """
    size, misses = n.record_bytes, missing * n.records
    extra = widening(size, c.alignment)
    holes, there = (max_gap + extra) // size, 1.0 - missing
    wide = there ** (holes + 1)
    bridged = there * (1.0 - (holes + 1) * there**holes + holes * wide) / missing
    reads = min(misses, 1.0 + max(0.0, misses - 1.0) * wide)
    read = misses * size + max(0.0, misses - 1.0) * bridged * size + reads * extra
    return min(read, n.bytes), max(reads, read / c.run.io.max_extent)


def widening(size: int, alignment: int) -> int:
    """What a read of a multiple of `size` bytes at a multiple of it grows by, on average."""
    return alignment - math.gcd(size, alignment)
