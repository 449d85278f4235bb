"""Decision matrices with inputs that fit them, passes over them, and what work on them takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

from flashinfer.tune.lowrank import Floats

HIDDEN, NEURONS = 48, 160


def blocks(matrix: Floats, size: int = 37) -> Callable[[], Iterator[Floats]]:
    """Passes over a matrix; each block is overwritten by the next, as the contract allows."""

    def one_pass() -> Iterator[Floats]:
        held = np.empty((size, matrix.shape[1]), dtype=np.float32)
        for i in range(0, len(matrix), size):
            part = held[: len(matrix[i : i + size])]
            part[:] = matrix[i : i + size]
            yield part

    return one_pass


def layer(seed: int = 0, hidden: int = HIDDEN, neurons: int = NEURONS, rank: int = 0) -> tuple[Floats, Floats, Floats]:
    """A decision matrix (of some rank), its bias, and inputs with a mean, in directions of very different size."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((neurons, hidden))
    if rank:
        rows = rng.standard_normal((neurons, rank)) @ rng.standard_normal((rank, hidden))
    rows *= rng.uniform(0.1, 3, (neurons, 1))
    mix = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0] * 0.9 ** np.arange(hidden)
    inputs = rng.standard_normal((2000, hidden)) @ mix.T + 0.3 * rng.standard_normal(hidden)
    return tuple(v.astype(np.float32) for v in (rows, rng.standard_normal(neurons), inputs))  # type: ignore[return-value]


def slices(matrix: Floats, size: int) -> Callable[[], Iterator[Floats]]:
    """As `blocks`, without memory of their own."""
    return lambda: (matrix[i : i + size] for i in range(0, len(matrix), size))


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
