"""How fast this machine reads memory and multiplies weights: the verbs of the backend on buffers beyond the caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from flashinfer import machine
from flashinfer.backend import Backend, Bundle, Part
from flashinfer.backend.base import Bytes
from flashinfer.config import TILE_NEURONS, TILE_ROWS, TILE_TOKENS, Rates
from flashinfer.quant import codec_named
from flashinfer.units import KIB, MIB

BUFFER = 96 * MIB
"""Larger than the last cache of most processors; less where memory is short."""
ENOUGH = 32 * MIB
"""What was measured on a smaller buffer may be the speed of a cache: it is not remembered."""
REPEATS = 3


def main_codec(codecs: dict[str, int]) -> str:
    """The codec of most bytes."""
    return max(codecs, key=lambda name: codecs[name])


def rates_key(backend: str, codec: str, threads: int) -> str:
    """What measured rates are remembered by; `backend` is `native` or `torch`."""
    return f"{backend} | {machine.processor_name()} | {threads} threads | {codec}"


def measure_rates(backend: Backend, codec: str, *, hidden: int, gated: bool, buffer: int = 0) -> Rates:
    """Rates of a model of that codec and width on this backend; takes under a second and `buffer` bytes."""
    size = max(256 * KIB, buffer or min(BUFFER, machine.usable_memory() // 16))
    raw = np.full(size, 1, dtype=np.uint8)  # written to, or all of it would be one page of zeros
    row = codec_named(codec).row_bytes(hidden)
    return Rates(
        dram=_dram(raw, backend.threads),
        linear=_linear(backend, raw, codec, hidden, row, 1),
        bundle=_bundle(backend, raw, codec, hidden, row, gated, 1),
        linear_prompt=_linear(backend, raw[: len(raw) // 2], codec, hidden, row, TILE_TOKENS),
        bundle_prompt=_bundle(backend, raw[: len(raw) // 2], codec, hidden, row, gated, TILE_TOKENS),
    )


def _rate(size: int, run: Callable[[], object]) -> float:
    """Bytes per second: the median of a few runs after one that warms up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return size / max(median(seconds), 1e-9)


def _dram(raw: Bytes, threads: int) -> float:
    parts = np.array_split(raw[: len(raw) // 8 * 8].view(np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return _rate(len(raw), lambda: list(pool.map(np.max, parts)))


def _linear(backend: Backend, raw: Bytes, codec: str, hidden: int, row: int, tokens: int) -> float:
    rows = max(TILE_ROWS, len(raw) // row // TILE_ROWS * TILE_ROWS)
    data = raw[: rows * row] if rows * row <= len(raw) else np.zeros(rows * row, dtype=np.uint8)
    weights = backend.matrix(data, codec, rows, hidden, keep=False)
    x, out = backend.place(np.zeros((tokens, hidden), dtype=np.float32)), backend.zeros(tokens, rows)
    return _rate(len(data), lambda: backend.linear(out, 0, x, weights))


def _bundle(backend: Backend, raw: Bytes, codec: str, hidden: int, row: int, gated: bool, tokens: int) -> float:
    size = 2 * row if gated else row
    bundle = Bundle(size, Part(size - row, hidden, codec), Part(0, hidden, codec) if gated else None, None)
    tiles = max(1, len(raw) // size // TILE_NEURONS)
    data = raw if tiles * TILE_NEURONS * size <= len(raw) else np.zeros(TILE_NEURONS * size, dtype=np.uint8)
    offsets = (np.arange(tiles * TILE_NEURONS, dtype=np.int64) * size).reshape(tiles, TILE_NEURONS)
    x, acc = backend.place(np.zeros((tokens, hidden), dtype=np.float32)), backend.zeros(tokens, hidden)
    fired = backend.place(np.ones((tiles, tokens, TILE_NEURONS), dtype=np.float32))
    return _rate(offsets.size * size, lambda: backend.ffn(acc, x, fired, data, offsets, bundle))
