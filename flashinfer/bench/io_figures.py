"""What is measured of a disk, and what comes out: pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal, get_args

import numpy as np

from flashinfer.config import DiskCurve, HostReaderName

Pattern = Literal["random", "sequential"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
READERS: tuple[HostReaderName, ...] = get_args(HostReaderName)


@dataclass(frozen=True)
class Combination:
    """What is measured: reads of `chunk` bytes, at random multiples of it or one after the other.

    `threads` is how many reads are in flight; only the reader of that name has a thread for each.
    """

    pattern: Pattern
    chunk: int
    threads: int
    reader: HostReaderName = "auto"


@dataclass(frozen=True)
class Slice:
    """One combination in one round. Seconds are wall time and CPU time (of ours: of the whole process), and the
    percentiles of the latency of a read. `device_bytes`: what the kernel fetched meanwhile; None where it does not
    say."""

    bytes: int
    reads: int
    seconds: float
    cpu_seconds: float
    p50_s: float
    p99_s: float
    device_bytes: int | None = None

    @property
    def mb_per_s(self) -> float:
        """Decimal megabytes per second."""
        return self.bytes / self.seconds / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        """Seconds of CPU time per decimal gigabyte."""
        return self.cpu_seconds / self.bytes * 1e9


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians over all rounds, of speed also the range `low` .. `high`; MB and GB are decimal."""

    mb_per_s: float
    low: float
    high: float
    reads_per_s: float
    p50_s: float
    p99_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True, kw_only=True)
class Beside(Figures):
    """fio's figures for the same. `speed` is ours over its MB/s and `cpu` ours over its CPU time per byte, taken round
    by round: medians, of speed also the range."""

    speed: float
    speed_low: float
    speed_high: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Result(Figures):
    """A combination over all rounds; `fio` where fio read beside us."""

    combination: Combination
    rounds: int
    fio: Beside | None = None


@dataclass(frozen=True)
class Measurement:
    """All results. `device_share`: bytes the kernel fetched per byte we asked for, None where it does not say."""

    results: tuple[Result, ...]
    file_bytes: int
    direct: bool
    note: str
    device_share: float | None


def figures(slices: Sequence[Slice]) -> Figures:
    """One slice for each round."""
    speeds = [s.mb_per_s for s in slices]
    return Figures(
        mb_per_s=median(speeds),
        low=min(speeds),
        high=max(speeds),
        reads_per_s=median(s.reads / s.seconds for s in slices),
        p50_s=median(s.p50_s for s in slices),
        p99_s=median(s.p99_s for s in slices),
        cpu_s_per_gb=median(s.cpu_s_per_gb for s in slices),
    )


def summary(c: Combination, ours: Sequence[Slice], fios: Sequence[Slice] = ()) -> Result:
    """One slice for each round, and as many of fio's or none."""
    return Result(**asdict(figures(ours)), combination=c, rounds=len(ours), fio=_beside(ours, fios) if fios else None)


def _beside(ours: Sequence[Slice], fios: Sequence[Slice]) -> Beside:
    pairs = list(zip(ours, fios, strict=True))
    speeds = [a.mb_per_s / b.mb_per_s for a, b in pairs]
    return Beside(
        **asdict(figures(fios)),
        speed=median(speeds),
        speed_low=min(speeds),
        speed_high=max(speeds),
        cpu=median(a.cpu_s_per_gb / max(b.cpu_s_per_gb, 1e-9) for a, b in pairs),
    )


def reader_named(text: str) -> HostReaderName:
    """What the user calls a reader. Raises ValueError for no such name."""
    for name in READERS:
        if text == name:
            return name
    raise ValueError(f"no such reader: {text!r}; there are {', '.join(READERS)}")


def pattern_named(text: str) -> Pattern:
    """What the user calls a pattern. Raises ValueError for no such name."""
    for name in PATTERNS:
        if text == name:
            return name
    raise ValueError(f"no such pattern: {text!r}; there are {', '.join(PATTERNS)}")


def fit_curve(results: Sequence[Result], threads: int) -> DiskCurve | None:
    """The cost model that fits the random reads, so many in flight, best in relative error; None from under two.

    Seconds per read are fitted as per_read_s + chunk / bytes_per_s by least squares, each chunk size weighing alike.
    """
    random = [r for r in results if (r.combination.pattern, r.combination.threads) == ("random", threads)]
    if len(random) < 2:
        return None
    seconds = np.array([1 / r.reads_per_s for r in random])
    chunks = np.array([float(r.combination.chunk) for r in random])
    design = np.stack([np.ones_like(seconds), chunks], axis=1) / seconds[:, None]
    (per_read, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    if per_byte <= 0:
        return None
    return DiskCurve(per_read_s=max(0.0, float(per_read)), bytes_per_s=1 / float(per_byte))
