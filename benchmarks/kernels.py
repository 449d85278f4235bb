"""Products against a plain reading of as many bytes: how much of the memory's speed the native kernels reach.

    python benchmarks/kernels.py [--threads 1 2] [--codecs f16 int8 ...] [--bytes 2GiB] [--rounds 31]
                                 [--out benchmarks/results/kernels.md]

For each codec, *dense*: `linear` with one token, through matrices that fill the working set one after the other;
*sparse*: the fused `ffn` with one token on a random twentieth of the neurons of a layer, through layers that fill
the working set; others are drawn each time. *Scan*: as many threads read as many bytes, 64 bits at a time (numpy's
`bitwise_or.reduce`, which lets the GIL go), in one stretch that begins where the last one ended. The working set is
written beforehand, in huge pages, as the runtime's buffers are.

In every round, for each row of the table, product and scan run one after the other, in turn one or the other first.
Given are medians (range) over the rounds, and of the share, which is taken round by round. The scan of the sparse rows
is a hard yardstick: it reads on, while the product's neurons lie anywhere.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np

from flashinfer import machine
from flashinfer.backend.base import Bundle, Bytes, Part
from flashinfer.backend.native_backend import NativeBackend
from flashinfer.config import TILE_NEURONS, TILE_ROWS
from flashinfer.io import AlignedBuffer
from flashinfer.quant import CODECS, codec_named
from flashinfer.units import MIB, format_size, parse_size

DENSE = (8640, 3200)
"""Rows and columns: a decision matrix of a llama of 3 billion parameters."""
SPARSE = {"llama-3b": (8640, 3200, True), "llama-7b": (11008, 4096, True), "opt-6.7b": (16384, 4096, False)}
"""Neurons, width, and whether a bundle has an up row beside its down row."""
ACTIVE = 0.05
LEAST = 256 * MIB
"""Bytes of one timed stretch, at least: some ten milliseconds."""
Stretch = Callable[[], int]
"""Something to time; returns the bytes of weights it went through."""


@dataclass
class Row:
    """One line of the table: bytes per second of each round."""

    name: str
    codec: str
    threads: int
    product: list[float] = field(default_factory=list)
    scan: list[float] = field(default_factory=list)

    @property
    def share(self) -> list[float]:
        """Product over scan, round by round."""
        return [a / b for a, b in zip(self.product, self.scan, strict=True)]


def scanner(memory: Bytes, pool: ThreadPoolExecutor, threads: int) -> Callable[[int], None]:
    """Reads so many bytes, on from where it stopped."""
    words, at = memory.view(np.uint64), 0

    def scan(size: int) -> None:
        nonlocal at
        left = size // 8
        while left:
            part = words[at : at + left]
            list(pool.map(np.bitwise_or.reduce, np.array_split(part, threads)))
            at, left = (at + len(part)) % len(words), left - len(part)

    return scan


def fill(memory: Bytes, codec: str, width: int) -> None:
    """Encoded rows of normal numbers, the same thousand again and again."""
    rows = codec_named(codec).encode(np.random.default_rng(0).standard_normal((1024, width)).astype(np.float32))
    some = rows.reshape(-1)
    for at in range(0, len(memory), len(some)):
        memory[at : at + len(some)] = some[: len(memory) - at]


def dense(backend: NativeBackend, memory: Bytes, codec: str) -> Stretch:
    """Matrices of DENSE one after the other, some of them at a time."""
    rows, cols = DENSE
    rows -= rows % TILE_ROWS
    size = rows * codec_named(codec).row_bytes(cols)
    x, out = backend.place(np.ones((1, cols), dtype=np.float32)), backend.zeros(1, rows)
    turn = cycle(
        [backend.matrix(memory[i * size :][:size], codec, rows, cols, keep=False) for i in range(len(memory) // size)]
    )
    count = -(-LEAST // size)

    def stretch() -> int:
        for _ in range(count):
            backend.linear(out, 0, x, next(turn))
        return count * size

    return stretch


def sparse(backend: NativeBackend, memory: Bytes, shape: tuple[int, int, bool], codec: str) -> Stretch:
    """The active neurons of layers one after the other; who is active is drawn beforehand."""
    neurons, width, gated = shape
    row = codec_named(codec).row_bytes(width)
    size = row * (1 + gated)
    bundle = Bundle(size, Part(size - row, width, codec), Part(0, width, codec) if gated else None)
    tiles = round(neurons * ACTIVE) // TILE_NEURONS
    layers = range(len(memory) // (neurons * size))
    places = cycle(list(_places(layers, neurons, size, tiles)))
    x, acc = backend.place(np.ones((1, width), dtype=np.float32)), backend.zeros(1, width)
    fired = backend.place(np.ones((tiles, 1, TILE_NEURONS), dtype=np.float32))
    step = tiles * TILE_NEURONS * size
    count = -(-LEAST // step)

    def stretch() -> int:
        for _ in range(count):
            backend.ffn(acc, x, fired, memory, next(places), bundle)
        return count * step

    return stretch


def _places(layers: range, neurons: int, size: int, tiles: int) -> Iterator[np.ndarray]:
    """The bytes at which the active bundles lie, sorted, layer after layer; in ten draws of each layer."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        for layer in layers:
            active = np.sort(rng.choice(neurons, tiles * TILE_NEURONS, replace=False))
            yield ((layer * neurons + active) * size).reshape(tiles, TILE_NEURONS)


def timed(stretch: Stretch) -> float:
    """Bytes per second."""
    started = time.perf_counter()
    size = stretch()
    return size / (time.perf_counter() - started)


def measure(row: Row, product: Stretch, scan: Callable[[int], None], rounds: int) -> None:
    """Both in turn; one round before the first warms up."""
    size = product()

    def plain() -> int:
        scan(size)
        return size

    plain()
    for i in range(rounds):
        for who in ("product", "scan")[:: -1 if i % 2 else 1]:
            getattr(row, who).append(timed(product if who == "product" else plain))


def run(memory: Bytes, codecs: list[str], threads: int, rounds: int) -> list[Row]:
    """All rows for so many threads."""
    backend, rows = NativeBackend(threads), []
    with ThreadPoolExecutor(threads) as pool:
        scan = scanner(memory, pool, threads)
        for codec in codecs:
            fill(memory, codec, DENSE[1])
            row = Row("dense {} x {}".format(*DENSE), codec, threads)
            measure(row, dense(backend, memory, codec), scan, rounds)
            rows.append(row)
            for name, shape in SPARSE.items():
                fill(memory, codec, shape[1])
                row = Row(f"sparse {name}, 5 % of {shape[0]} x {shape[1]}", codec, threads)
                measure(row, sparse(backend, memory, shape, codec), scan, rounds)
                rows.append(row)
    backend.close()
    return rows


def _cell(values: list[float], unit: float, digits: int) -> str:
    v = sorted(value / unit for value in values)
    return f"{median(v):.{digits}f} ({v[0]:.{digits}f}-{v[-1]:.{digits}f})"


def markdown(rows: list[Row], about: list[str]) -> str:
    """The table, and what it was measured on."""
    lines = [
        "# Kernels against a scan of memory",
        "",
        *about,
        "",
        "| product | codec | threads | GB/s | scan GB/s | % of the scan |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (_cell(row.product, 1e9, 1), _cell(row.scan, 1e9, 1), _cell(row.share, 0.01, 0))
        lines.append(f"| {row.name} | {row.codec} | {row.threads} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(a: argparse.Namespace, load: float) -> list[str]:
    """The circumstances, one fact for each line."""
    return [
        f"- command: `python benchmarks/kernels.py {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {datetime.now(UTC):%Y-%m-%d}, {machine.processor_name()}, {machine.compute_threads()} cores, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, numpy {np.__version__}",
        f"- native kernels: {NativeBackend(1).name}; working set {format_size(a.bytes)}, {a.rounds} rounds",
        f"- load average when it began: {load:.2f} (0 is a quiet machine)",
    ]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    p.add_argument("--bytes", type=parse_size, default=parse_size("2GiB"), help="of the working set (default: 2GiB)")
    p.add_argument("--rounds", type=int, default=31)
    p.add_argument("--out", type=Path, help="write the report here, too")
    a = p.parse_args(argv)
    about = describe(a, os.getloadavg()[0])
    with AlignedBuffer(a.bytes) as buffer:
        rows = [row for threads in a.threads for row in run(buffer.array, a.codecs, threads, a.rounds)]
    text = markdown(rows, about)
    print(text, end="")
    if a.out is not None:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
