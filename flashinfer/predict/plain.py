"""The predictors that need no calibration: by the decision product, everyone, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashinfer.backend import Buffer
from flashinfer.predict.base import Floats, Guess, Matrices, Span


class Exact:
    """Activations that vanish up to a threshold (ReLU family, 0 for most): nothing is guessed.

    decisions: role of each layer's decision matrix, without `.weight`. threshold: a neuron fires above it.
    """

    name, exact = "exact", True

    def __init__(self, matrices: Matrices, decisions: Sequence[str], threshold: float = 0.0) -> None:
        self._matrices, self._decisions, self._threshold = matrices, decisions, float(np.float32(threshold))

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        gate = self._matrices.linear(self._decisions[layer], x)
        return Guess(self._matrices.backend.exceeds(gate, span.skip, span.count, self._threshold), gate)


class Everything:
    """Every neuron: activations that are never zero, and the naive baseline.

    decisions: as `Exact`; None for a layer whose decision matrix is in the bundles.
    """

    name, exact = "all", True

    def __init__(self, matrices: Matrices, decisions: Sequence[str | None]) -> None:
        self._matrices, self._decisions = matrices, decisions

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        role = self._decisions[layer]
        return Guess(None, None if role is None else self._matrices.linear(role, x))


class Oracle:
    """Looks at the true decision products, which somebody else computes: what no predictor can be better than.

    truth: layer and FFN inputs `[tokens, hidden]` to decision products `[tokens, neurons]`. threshold: as `Exact`.
    """

    name, exact = "oracle", True

    def __init__(self, matrices: Matrices, truth: Callable[[int, Floats], Floats], threshold: float = 0.0) -> None:
        self._matrices, self._truth, self._threshold = matrices, truth, np.float32(threshold)

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        tokens = self._matrices.backend.fetch(x)[span.skip : span.skip + span.count]
        return Guess(self._matrices.backend.flags(self._truth(layer, tokens) > self._threshold))
