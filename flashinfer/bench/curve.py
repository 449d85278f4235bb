"""A disk's curve in a few seconds: chunk and depth through the runtime's own reader, on a store's neuron file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from flashinfer.bench.io import BATCH, measure
from flashinfer.bench.io_figures import Combination, Result, fit_curve
from flashinfer.bench.known import KnownDisk
from flashinfer.config import DiskCurve, IoConfig
from flashinfer.units import KIB, MIB

CHUNKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB)
SECONDS = 0.2
"""For each combination of chunk and depth, over all rounds."""
ROUNDS = 2


def measure_curve(
    file: Path,
    *,
    seconds: float = SECONDS,
    room: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> KnownDisk | None:
    """The curve of the disk under this file, with as many reads in flight as the runtime has, and alone.

    It takes at most `room` bytes of memory (default: 128 MiB), which leaves out the largest chunks where it is small.
    None where the file or the room is too small to tell, or the disk's figures follow no such curve.

    Raises:
        StoreError, StoreReadError: the file cannot be read.
    """
    size, depth = file.stat().st_size, IoConfig().in_flight
    batch = depth * max(CHUNKS) if room is None else room // 2
    chunks = [chunk for chunk in CHUNKS if 2 * chunk <= size and depth * chunk <= batch]
    if len(chunks) < 2:
        return None
    combinations = [Combination("random", chunk, threads) for chunk in chunks for threads in (1, depth)]
    measured = measure(file, combinations, seconds=seconds, rounds=ROUNDS, batch=min(batch, BATCH), progress=progress)
    curve = curve_of(measured.results, depth)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return None if curve is None else KnownDisk(curve, size, when, measured.note)


def curve_of(results: Sequence[Result], depth: int) -> DiskCurve | None:
    """The curve that fits: transfers and their number at this depth, the latency from reads that are alone."""
    curve = fit_curve(results, depth)
    if curve is None:
        return None
    alone = [r for r in results if r.combination.threads == 1 and r.combination.chunk <= 64 * KIB]
    extra = [1 / r.reads_per_s - r.combination.chunk / curve.bytes_per_s for r in alone]
    return replace(curve, latency_s=max(curve.per_read_s, median(extra))) if extra else curve
