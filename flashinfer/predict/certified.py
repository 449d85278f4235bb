"""Exact selection from a sketch of the decision matrix: a neuron is left out only where it certainly does not fire."""

from __future__ import annotations

from collections.abc import Sequence

from flashinfer.backend import Buffer
from flashinfer.predict.base import Guess, Matrices, Span


class Certified:
    """A sketch, an 8-bit copy of the decision matrix, bounds the products; the true rows in the bundles decide.

    sketches: role of each layer's sketch, without `.weight`. threshold: a neuron fires above it.
    """

    name, exact = "certified", True

    def __init__(self, matrices: Matrices, sketches: Sequence[str], threshold: float = 0.0) -> None:
        self._matrices, self._sketches, self._threshold = matrices, sketches, threshold
        self._slack: list[Buffer] = []
        for role in sketches:
            slack = matrices.vector(f"{role}.slack")
            assert slack is not None
            self._slack.append(slack)
        self._bias = [matrices.vector(f"{role}.bias") for role in sketches]

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        sketched = self._matrices.product(f"{self._sketches[layer]}.weight", x)
        slack, bias, backend = self._slack[layer], self._bias[layer], self._matrices.backend
        return Guess(backend.may_exceed(sketched, x, span.skip, span.count, slack, bias, self._threshold))
