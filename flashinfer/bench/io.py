"""How fast this disk serves reads of a size, so many in flight: what a plan's predictions rest on.

Method: reads go through the same readers the runtime uses, past the page cache, into touched memory, with
`threads` reads in flight at every moment. All combinations are measured in each of several rounds, one after the
other, so that a disturbance or a warming device hits them alike; reported are the median and the range
over the rounds. The kernel's own count of bytes fetched for this process is the proof that no cache answered.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import numpy as np

from flashinfer import machine
from flashinfer.config import COPY_CHUNK, DiskCurve, IoConfig, ReaderName
from flashinfer.errors import DiskFullError, StoreError
from flashinfer.io import AlignedBuffer, Extents, Reader, open_reader
from flashinfer.io.files import describe, open_file
from flashinfer.store import open_store
from flashinfer.units import KIB, MIB, format_size

Pattern = Literal["random", "sequential"]
CHUNKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB)
THREADS = (1, 8, 16, 32)
READERS: tuple[ReaderName, ...] = get_args(ReaderName)
ROUNDS = 5
BATCH = 8 * MIB
"""Bytes submitted at once, where that many reads in flight are not more."""
_MOST_READS = 512


@dataclass(frozen=True)
class Combination:
    """What is measured: reads of `chunk` bytes, at random multiples of it or one after the other.

    `threads` is how many reads are in flight; only the reader of that name has a thread for each.
    """

    pattern: Pattern
    chunk: int
    threads: int
    reader: ReaderName = "auto"


@dataclass(frozen=True)
class Slice:
    """One combination in one round. Seconds are wall time and CPU time of the whole process."""

    bytes: int
    reads: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Result:
    """A combination over all rounds. Speeds are medians, `low` and `high` their range; MB and GB are decimal."""

    combination: Combination
    mb_per_s: float
    low: float
    high: float
    reads_per_s: float
    cpu_s_per_gb: float
    rounds: int


@dataclass(frozen=True)
class Measurement:
    """All results. `device_share`: bytes the kernel fetched per byte asked, None where it does not say."""

    results: tuple[Result, ...]
    file_bytes: int
    direct: bool
    note: str
    device_share: float | None


def reader_name(text: str) -> ReaderName:
    """What the user calls a reader. Raises ValueError for no such name."""
    for name in READERS:
        if text == name:
            return name
    raise ValueError(f"no such reader: {text!r}; there are {', '.join(READERS)}")


def all_combinations(
    chunks: Sequence[int] = CHUNKS, threads: Sequence[int] = THREADS, readers: Sequence[ReaderName] = ("auto",)
) -> list[Combination]:
    """Both patterns, every chunk, every reader, every number of reads in flight."""
    patterns: tuple[Pattern, ...] = ("random", "sequential")
    return [
        Combination(pattern, chunk, n, reader)
        for pattern in patterns
        for chunk in chunks
        for reader in readers
        for n in threads
    ]


@contextlib.contextmanager
def file_to_read(path: Path, file_size: int, progress: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The file to measure on: `path` itself, the neuron file of a store, or a new file in a directory.

    A new file holds random bytes (some devices store zeros without storing them) and is removed at the end.

    Raises:
        StoreError: there is no such path, or the store is damaged.
        DiskFullError: the directory has no room for `file_size` bytes.
    """
    if path.is_file():
        yield path.resolve()
    elif (path / "manifest.json").exists():
        store = open_store(path)
        yield store.path_of(store.manifest.neurons)
    elif path.is_dir():
        name = path / f".flashinfer-bench-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            progress(f"writing {format_size(file_size)} of random bytes to {path}")
            _write_random(name, file_size)
            yield name
        finally:
            name.unlink(missing_ok=True)
    else:
        raise StoreError(f"{path} does not exist; give a store, a file, or a directory to make a test file in")


def _write_random(path: Path, size: int) -> None:
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    if free < size + COPY_CHUNK:
        raise DiskFullError(
            f"{path.parent} has {format_size(free)} free, the test file needs {format_size(size)}; "
            "give a smaller --file-size or another directory"
        )
    rng = np.random.default_rng()
    with path.open("xb") as out:
        for start in range(0, size, COPY_CHUNK):
            out.write(rng.bytes(min(COPY_CHUNK, size - start)))
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    path: Path,
    combinations: Sequence[Combination],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    direct: bool = True,
    batch: int = BATCH,
    progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Measure every combination for about `seconds` each, in `rounds` interleaved rounds; two batches of `batch`
    bytes (or of as many reads as are to be in flight, where these are more) are in memory.

    Raises:
        ValueError: the file is smaller than the largest chunk, or a chunk is no multiple of the disk's unit.
        StoreError: the file cannot be opened.
        StoreReadError: a read failed.
        PlatformError: a combination asks for io_uring and there is none.
    """
    size = path.stat().st_size
    if min(c.chunk for c in combinations) < 1:
        raise ValueError("a chunk has at least one byte")
    if size < max(c.chunk for c in combinations):
        raise ValueError(f"the file has {size} bytes, fewer than the largest chunk")
    slices: dict[Combination, list[Slice]] = {c: [] for c in combinations}
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        readers: dict[tuple[ReaderName, int], Reader] = {}
        for c in combinations:
            if (c.reader, c.threads) not in readers:
                config = IoConfig(reader=c.reader, depth=c.threads, threads=c.threads)
                reader = readers[c.reader, c.threads] = open_reader([path], config, direct=direct)
                stack.callback(reader.close)
        buffer = stack.enter_context(AlignedBuffer(2 * max(_reads_in_batch(c, batch) * c.chunk for c in combinations)))
        buffer.array.fill(1)  # touched, so that no page fault is timed
        before = machine.device_bytes_read()
        for i in range(rounds):
            for c in combinations:
                progress(f"round {i + 1} of {rounds}: {c.pattern} {format_size(c.chunk)}, {c.threads} in flight")
                reader = readers[c.reader, c.threads]
                slices[c].append(_measure_slice(reader, c, size, seconds / rounds, buffer, rng, batch))
        after = machine.device_bytes_read()
    asked = sum(s.bytes for parts in slices.values() for s in parts)
    return Measurement(
        results=tuple(_summary(c, parts) for c, parts in slices.items()),
        file_bytes=size,
        direct=reader.direct,
        note=_how(path, direct=direct),
        device_share=None if before is None or after is None else (after - before) / asked,
    )


def _how(path: Path, *, direct: bool) -> str:
    file = open_file(path, direct=direct)
    try:
        return describe([file])
    finally:
        file.close()


def _reads_in_batch(c: Combination, batch: int) -> int:
    """Reads per batch; two batches are under way, so that `threads` reads are in flight also between them."""
    return max(c.threads, min(_MOST_READS, batch // c.chunk))


def _batches(c: Combination, file_bytes: int, rng: np.random.Generator, batch: int) -> Iterator[Extents]:
    """Endless batches: sorted random chunks, as a plan asks for them, or the next ones in order."""
    count, there = _reads_in_batch(c, batch), file_bytes // c.chunk
    lengths = np.full(count, c.chunk, dtype=np.int64)
    targets = np.arange(count, dtype=np.int64) * c.chunk
    start = int(rng.integers(there))
    while True:
        if c.pattern == "random":
            chunks = np.sort(rng.integers(there, size=count))
        else:
            chunks = (start + np.arange(count)) % there
            start += count
        yield Extents(chunks * c.chunk, lengths, targets)


def _measure_slice(
    reader: Reader,
    c: Combination,
    file_bytes: int,
    seconds: float,
    buffer: AlignedBuffer,
    rng: np.random.Generator,
    batch: int,
) -> Slice:
    """Keep two batches in flight until the time is up; at least three batches."""
    half = _reads_in_batch(c, batch) * c.chunk
    halves = cycle([buffer.array[:half], buffer.array[half : 2 * half]])
    batches = _batches(c, file_bytes, rng, batch)
    reads, count = reader.stats.reads, reader.stats.bytes
    cpu, started = time.process_time(), time.perf_counter()
    pending = [reader.submit(0, next(batches), next(halves)) for _ in range(2)]
    while True:
        pending.pop(0).wait()
        pending.append(reader.submit(0, next(batches), next(halves)))
        if time.perf_counter() - started >= seconds:
            break
    for last in pending:
        last.wait()
    elapsed = time.perf_counter() - started
    return Slice(reader.stats.bytes - count, reader.stats.reads - reads, elapsed, time.process_time() - cpu)


def _summary(c: Combination, slices: Sequence[Slice]) -> Result:
    speeds = [s.bytes / s.seconds / 1e6 for s in slices]
    return Result(
        combination=c,
        mb_per_s=median(speeds),
        low=min(speeds),
        high=max(speeds),
        reads_per_s=median(s.reads / s.seconds for s in slices),
        cpu_s_per_gb=median(s.cpu_seconds / s.bytes * 1e9 for s in slices),
        rounds=len(slices),
    )


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
