"""Made-up firings of a layer's neurons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.bool_]


def packed(active: Bits) -> npt.NDArray[np.uint8]:
    return np.packbits(active, axis=1)


def grouped(tokens: int, neurons: int, groups: int, seed: int) -> tuple[Bits, npt.NDArray[np.int64]]:
    """Each token fires most of one group, and strays; which neurons form a group is hidden in a permutation."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(neurons) % groups)
    chosen = rng.integers(0, groups, tokens)
    active = (group[None] == chosen[:, None]) & (rng.random((tokens, neurons)) < 0.8)
    return active | (rng.random((tokens, neurons)) < 0.02), group
