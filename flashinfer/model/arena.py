"""One buffer for everything a bundle of neurons can be in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.io import AlignedBuffer
from flashinfer.memory import Plan
from flashinfer.store import Geometry, Manifest
from flashinfer.store.geometry import round_up

Bytes = npt.NDArray[np.uint8]


class Arena:
    """A bundle of zeros (what padding points to), the slots of every layer, two halves of staging, two of guesses, the
    ring.

    So a bundle is a byte offset, wherever it is. Invariant: the size is the sum of the plan's figures.

    Attributes:
        bytes: all of it; the bundle of zeros is at 0.
        slots: where the slots of each layer begin.
        staging: where the first half of staging begins.
        guesses: where the first half for guesses begins.
        ring: where the ring of the stream begins, which ends the arena.
    """

    def __init__(self, manifest: Manifest, geometries: Sequence[Geometry], plan: Plan) -> None:
        at = round_up(max(layer.bundle_bytes for layer in manifest.layers), FILE_ALIGNMENT)
        self.slots: list[int] = []
        for geometry, slots in zip(geometries, plan.slots, strict=True):
            self.slots.append(at)
            at += round_up(slots * geometry.record_bytes, FILE_ALIGNMENT)
        self.staging = at
        self.guesses = at + 2 * plan.neuron_staging
        self.ring = self.guesses + 2 * plan.guess
        self._buffer = AlignedBuffer(self.ring + plan.ring)
        self.bytes: Bytes = self._buffer.array

    def close(self) -> None:
        """Drop the memory; it goes with the last who can see it."""
        self.bytes = np.empty(0, dtype=np.uint8)
        self._buffer.close()
