"""Would zstd at rest shorten loading, or a token? Ratios and speeds on the bytes of a real store.

    python benchmarks/compress.py STORE [--level 1 --level 3] [--rounds 3]

For dense matrices, predictors and neuron records apart: bytes left by zstd, as they are and with the bytes of each
value split into planes (all low bytes, then all high ones, which compresses floats better), how fast one thread
decompresses, and the disk speed below which reading less makes up for it: reading and decompressing overlap, so loading
takes the longer of the two, and compression helps while a disk is slower than the decompression. Random weights
compress unlike trained ones: give a trained model. Results: `docs/quantization.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import zstandard

sys.path.insert(0, str(Path(__file__).parent.parent))

from flashinfer.machine import compute_threads
from flashinfer.store import Store, open_store
from flashinfer.units import MIB

BLOCK = MIB
"""Bytes compressed together: what one read brings when a matrix is streamed. Records are compressed one by one."""
WIDTHS = {"f32": 4, "f16": 2, "bf16": 2}
Bytes = npt.NDArray[np.uint8]


def kinds(store: Store) -> dict[tuple[str, str], tuple[list[Bytes], int]]:
    """Kind and codec -> blocks of bytes, and the width of a value (1: codes)."""
    found: dict[tuple[str, str], tuple[list[Bytes], int]] = {}
    for role, t in store.manifest.tensors.items():
        if len(t.shape) == 2:
            data = np.fromfile(store.path_of(store.manifest.file_of(t)), np.uint8, t.bytes, offset=t.offset)
            kind = "predictors" if t.file == "predictors" else "table" if role.startswith("embed") else "dense"
            blocks, _ = found.setdefault((kind, t.codec), ([], WIDTHS.get(t.codec, 1)))
            blocks += [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    for layer in store.manifest.layers:
        data = np.fromfile(store.path_of(store.manifest.neurons), np.uint8, layer.bytes, offset=layer.offset)
        codec = layer.parts[0].codec
        blocks, _ = found.setdefault(("records", codec), ([], WIDTHS.get(codec, 1)))
        blocks += list(data.reshape(layer.records, layer.record_bytes))
    return found


def planes(block: Bytes, width: int) -> Bytes:
    """The bytes of each value apart."""
    return np.ascontiguousarray(block[: len(block) // width * width].reshape(-1, width).T).reshape(-1)


def decompression(packed: list[bytes], size: int, rounds: int) -> float:
    """Bytes per second that come out of one thread: the median of a few rounds."""
    machine, seconds = zstandard.ZstdDecompressor(), []
    for _ in range(rounds):
        started = time.perf_counter()
        for data in packed:
            machine.decompress(data)
        seconds.append(time.perf_counter() - started)
    return size / median(seconds)


def rows(store: Store, levels: list[int], rounds: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each kind, level and arrangement."""
    threads = compute_threads()
    for (kind, codec), (blocks, width) in kinds(store).items():
        for split in (False, True) if width > 1 else (False,):
            some = [planes(b, width) if split else b for b in blocks]
            size = sum(map(len, some))
            for level in levels:
                packed = [zstandard.ZstdCompressor(level=level).compress(b.data) for b in some]
                rate = decompression(packed, size, rounds)
                left = sum(map(len, packed)) / size
                gain = f"{left * threads * rate / 1e9:.2f}" if left < 0.99 else "-"
                how = f"zstd -{level}{', planes' if split else ''}"
                yield (kind, codec, f"{size / 1e6:.1f}", how, f"{left:.1%}", f"{rate / 1e9:.2f}", gain)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("store", type=Path)
    p.add_argument("--level", type=int, action="append")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    header = ("what", "codec", "MB", "how", "bytes left", "GB/s out of a thread",
              f"helps on disks below, GB/s, with {compute_threads()} threads")  # fmt: skip
    for cells in [header, ("---",) * len(header), *rows(open_store(a.store), a.level or [1, 3], a.rounds)]:
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
