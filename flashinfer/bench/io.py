"""How fast this disk serves reads of a size, so many in flight: what a plan's predictions rest on.

Method: reads go through the same readers the runtime uses, past the page cache, into touched memory, with
`threads` reads in flight at every moment. All combinations are measured in each of several rounds, one after the
other, so that a disturbance or a warming device hits them alike; reported are the median and the range
over the rounds. A rival (`bench.fio`) reads the same right before or after, in turn. The kernel's own count of bytes
fetched for this process is the proof that no cache answered.

The latency of a read is taken by the reader in the same slices (`take_seconds`). With io_uring it runs from the moment
the read is handed to the kernel until its end is seen, so it includes what the kernel does to submit the reads handed
over with it, and the wait for whoever looks next; fio's completion latency leaves out the former. With threads it is
what one thread spends in one read, the return to Python included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np

from flashinfer import machine
from flashinfer.bench.io_figures import PATTERNS, Combination, Measurement, Pattern, Slice, summary
from flashinfer.config import HostReaderName, IoConfig
from flashinfer.io import AlignedBuffer, Extents, ThreadReader, UringReader, open_host_reader
from flashinfer.io.files import describe, open_file
from flashinfer.units import KIB, MIB, format_size

CHUNKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB)
THREADS = (1, 8, 16, 32)
ROUNDS = 5
BATCH = 8 * MIB
"""Bytes submitted at once, where that many reads in flight are not more."""
_MOST_READS = 512

TimedReader = ThreadReader | UringReader
Rival = Callable[[Combination, float], Slice]
"""Somebody else who reads that combination for so many seconds; its reader is `io_uring` or `threads`, not `auto`."""


def all_combinations(
    chunks: Sequence[int] = CHUNKS,
    threads: Sequence[int] = THREADS,
    readers: Sequence[HostReaderName] = ("auto",),
    patterns: Sequence[Pattern] = PATTERNS,
) -> list[Combination]:
    """Every pattern, every chunk, every reader, every number of reads in flight."""
    return [
        Combination(pattern, chunk, n, reader)
        for pattern in patterns
        for chunk in chunks
        for reader in readers
        for n in threads
    ]


def measure(
    path: Path,
    combinations: Sequence[Combination],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    direct: bool = True,
    batch: int = BATCH,
    rival: Rival | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Measure every combination for about `seconds` each, in `rounds` interleaved rounds; two batches of `batch`
    bytes (or of as many reads as are to be in flight, where these are more) are in memory. The rival reads for as long,
    before us in every other round; where our reads are not direct it is not asked.

    Raises:
        ValueError: the file is smaller than the largest chunk, or a chunk is no multiple of the disk's unit.
        StoreError: the file cannot be opened.
        StoreReadError: a read failed.
        PlatformError: a combination asks for io_uring and there is none; or what the rival raises.
    """
    size = path.stat().st_size
    _check(combinations, size)
    ours: dict[Combination, list[Slice]] = {c: [] for c in combinations}
    rivals: dict[Combination, list[Slice]] = {c: [] for c in combinations}
    with contextlib.ExitStack() as stack:
        readers = _open_readers(path, combinations, direct, stack)
        direct = all(reader.direct for reader in readers.values())
        buffer = stack.enter_context(AlignedBuffer(2 * max(_reads_in_batch(c, batch) * c.chunk for c in combinations)))
        buffer.array.fill(1)  # touched, so that no page fault is timed
        run = _Run(size, seconds / rounds, buffer, batch, np.random.default_rng(0), rival if direct else None)
        for i in range(rounds):
            for c in combinations:
                progress(f"round {i + 1} of {rounds}: {c.pattern} {format_size(c.chunk)}, {c.threads} in flight")
                our, theirs = run.in_turn(readers[c.reader, c.threads], c, rival_first=i % 2 == 1)
                ours[c].append(our)
                rivals[c] += theirs
    return Measurement(
        results=tuple(summary(c, ours[c], rivals[c]) for c in combinations),
        file_bytes=size,
        direct=direct,
        note=_how(path, direct=direct),
        device_share=_device_share([s for parts in ours.values() for s in parts]),
    )


def _check(combinations: Sequence[Combination], size: int) -> None:
    if min(c.chunk for c in combinations) < 1:
        raise ValueError("a chunk has at least one byte")
    if size < max(c.chunk for c in combinations):
        raise ValueError(f"the file has {size} bytes, fewer than the largest chunk")


def _open_readers(
    path: Path, combinations: Sequence[Combination], direct: bool, stack: contextlib.ExitStack
) -> dict[tuple[HostReaderName, int], TimedReader]:
    """One for each reader and number of reads in flight; the stack closes them."""
    readers: dict[tuple[HostReaderName, int], TimedReader] = {}
    for c in combinations:
        if (c.reader, c.threads) not in readers:
            config = IoConfig(reader=c.reader, depth=c.threads, threads=c.threads)
            reader = readers[c.reader, c.threads] = open_host_reader([path], config, direct=direct, timed=True)
            stack.callback(reader.close)
    return readers


def _device_share(slices: Sequence[Slice]) -> float | None:
    """Of our slices alone: the kernel adds what a child has read, fio, to what it says of this process."""
    fetched = [s.device_bytes for s in slices if s.device_bytes is not None]
    return sum(fetched) / sum(s.bytes for s in slices) if len(fetched) == len(slices) else None


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


@dataclass(frozen=True)
class _Run:
    """What all slices share: the file's bytes, seconds of a slice, memory to read into, bytes of a batch, chance."""

    file_bytes: int
    seconds: float
    buffer: AlignedBuffer
    batch: int
    rng: np.random.Generator
    rival: Rival | None

    def in_turn(self, reader: TimedReader, c: Combination, *, rival_first: bool) -> tuple[Slice, list[Slice]]:
        """Our slice and the rival's, if there is one."""
        if self.rival is None:
            return self.slice(reader, c), []
        same = replace(c, reader="io_uring" if isinstance(reader, UringReader) else "threads")
        if rival_first:
            theirs = self.rival(same, self.seconds)
            return self.slice(reader, c), [theirs]
        return self.slice(reader, c), [self.rival(same, self.seconds)]

    def slice(self, reader: TimedReader, c: Combination) -> Slice:
        """Keep two batches in flight until the time is up; at least three batches."""
        half = _reads_in_batch(c, self.batch) * c.chunk
        halves = cycle([self.buffer.array[:half], self.buffer.array[half : 2 * half]])
        batches = _batches(c, self.file_bytes, self.rng, self.batch)
        reads, count = reader.stats.reads, reader.stats.bytes
        before, cpu, started = machine.device_bytes_read(), time.process_time(), time.perf_counter()
        pending = [reader.submit(0, next(batches), next(halves)) for _ in range(2)]
        while True:
            pending.pop(0).wait()
            pending.append(reader.submit(0, next(batches), next(halves)))
            if time.perf_counter() - started >= self.seconds:
                break
        for last in pending:
            last.wait()
        elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        after = machine.device_bytes_read()
        fetched = None if before is None or after is None else after - before
        p50, p99 = np.quantile(reader.take_seconds(), (0.5, 0.99)).tolist()
        asked = reader.stats.bytes - count, reader.stats.reads - reads
        return Slice(*asked, elapsed, cpu_seconds, p50, p99, fetched)
