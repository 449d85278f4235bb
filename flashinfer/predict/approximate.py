"""The predictors that may be wrong: low-rank factors, and thresholds on the gate. Both are opt-in and measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashinfer.backend import Buffer
from flashinfer.predict.base import Floats, Guess, Matrices, Span

Bounds = tuple[Floats, Floats, Floats]
"""Per neuron, on its decision product: the upper bound beyond which it fires, and the interval below in which it does,
too (`criterion.bounds`)."""


class LowRank:
    """Two thin factors trained to name who fires (arXiv 2312.11514, section 3.1): b (a x) + bias + shift > 0.

    Bundles hold the decision rows, so of those named the true product decides; those not named are lost.

    factors: role of each layer's factors, without `.a.weight`, `.b.weight`. shifts: per layer, added to the score: the
    larger, the more are named.
    """

    name, exact = "low-rank", False

    def __init__(self, matrices: Matrices, factors: Sequence[str], shifts: Sequence[float]) -> None:
        self._matrices, self._factors = matrices, factors
        self._above = [float(np.float32(-shift)) for shift in shifts]

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        role = self._factors[layer]
        score = self._matrices.linear(f"{role}.b", self._matrices.linear(f"{role}.a", x))
        return Guess(self._matrices.backend.exceeds(score, span.skip, span.count, self._above[layer]), final=True)


class Threshold:
    """Neurons of a gated FFN whose activation is small are left out (CATS, arXiv 2404.08763; a threshold for each
    neuron as in CHESS, arXiv 2409.01366).

    decisions: role of each layer's decision matrix, without `.weight`. bounds: per layer, who fires.
    """

    name, exact = "threshold", False

    def __init__(self, matrices: Matrices, decisions: Sequence[str], bounds: Sequence[Bounds]) -> None:
        self._matrices, self._decisions = matrices, decisions
        self._bounds = [tuple(map(matrices.backend.vector, some)) for some in bounds]

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        gate = self._matrices.linear(self._decisions[layer], x)
        high, low, up = self._bounds[layer]
        return Guess(self._matrices.backend.exceeds(gate, span.skip, span.count, high, (low, up)), gate, True)
