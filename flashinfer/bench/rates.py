"""How fast this machine reads memory and multiplies weights: the verbs of the backend on buffers beyond the caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from flashinfer import machine
from flashinfer.backend import Backend, Buffer, Bundle, Copies, Part
from flashinfer.backend.copies import Bytes, Memory
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
    """What measured rates are remembered by; `backend` is `native`, `torch`, or `torch on` a device by its name."""
    return f"{backend} | {machine.processor_name()} | {threads} threads | {codec}"


def measure_rates(backend: Backend, codec: str, *, hidden: int, gated: bool, buffer: int = 0) -> Rates:
    """Rates of a model of that codec and width on this backend; takes under a second and `buffer` bytes."""
    size = max(256 * KIB, buffer or min(BUFFER, machine.usable_memory() // 16))
    raw = np.full(size, 1, dtype=np.uint8)  # written to, or all of it would be one page of zeros
    row, there = codec_named(codec).row_bytes(hidden), raw
    copied: dict[str, float] = {}
    if backend.copies is not None:
        there, copied = _device(backend.copies, raw)
    return Rates(
        dram=_dram(raw, backend.threads),
        linear=_linear(backend, there, codec, hidden, row, 1),
        bundle=_bundle(backend, there, codec, hidden, row, gated, 1),
        linear_prompt=_linear(backend, there[: size // 2], codec, hidden, row, TILE_TOKENS),
        bundle_prompt=_bundle(backend, there[: size // 2], codec, hidden, row, gated, TILE_TOKENS),
        **copied,
    )


def _device(copies: Copies, raw: Bytes) -> tuple[Memory, dict[str, float]]:
    """The bytes in a device's memory, and the rates of coming there and of reading there: a copy reads and writes."""
    there, half, start = copies.allocate(len(raw)), len(raw) // 2, np.zeros(1, dtype=np.int64)
    copies.pin(raw)

    def up() -> None:
        copies.upload(there, start, raw, start, len(raw))
        copies.wait()

    def within() -> None:
        copies.move(there, start + half, start, half)
        copies.wait()

    return there, {"pcie": _rate(len(raw), up), "vram": _rate(2 * half, within)}


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


def _linear(backend: Backend, raw: Memory, codec: str, hidden: int, row: int, tokens: int) -> float:
    rows = max(TILE_ROWS, len(raw) // row // TILE_ROWS * TILE_ROWS)
    data = raw[: rows * row] if rows * row <= len(raw) else _zeros(backend, rows * row)
    weights = backend.matrix(data, codec, rows, hidden, keep=False)
    x, out = backend.place(np.zeros((tokens, hidden), dtype=np.float32)), backend.zeros(tokens, rows)

    def run() -> None:
        backend.linear(out, 0, x, weights)
        _ended(backend, out)

    return _rate(len(data), run)


def _bundle(backend: Backend, raw: Memory, codec: str, hidden: int, row: int, gated: bool, tokens: int) -> float:
    size = 2 * row if gated else row
    bundle = Bundle(size, Part(size - row, hidden, codec), Part(0, hidden, codec) if gated else None, None)
    tiles = max(1, len(raw) // size // TILE_NEURONS)
    data = raw if tiles * TILE_NEURONS * size <= len(raw) else _zeros(backend, TILE_NEURONS * size)
    offsets = (np.arange(tiles * TILE_NEURONS, dtype=np.int64) * size).reshape(tiles, TILE_NEURONS)
    x, acc = backend.place(np.zeros((tokens, hidden), dtype=np.float32)), backend.zeros(tokens, hidden)
    fired = backend.place(np.ones((tiles, tokens, TILE_NEURONS), dtype=np.float32))

    def run() -> None:
        backend.ffn(acc, x, fired, data, offsets, bundle)
        _ended(backend, acc)

    return _rate(offsets.size * size, run)


def _zeros(backend: Backend, size: int) -> Memory:
    return np.zeros(size, dtype=np.uint8) if backend.copies is None else backend.copies.allocate(size)


def _ended(backend: Backend, result: Buffer) -> None:
    """On a device arithmetic goes on after the call that asks for it."""
    if backend.copies is not None:
        backend.fetch(result)
