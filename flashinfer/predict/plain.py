"""The predictors that need no calibration: by the sign, everyone, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashinfer.backend import Buffer
from flashinfer.predict.base import Floats, Guess, Matrices, Span


class Exact:
    """Activations that vanish on non-positive inputs (ReLU family): the decision product's sign, nothing is guessed.

    decisions: role of each layer's decision matrix, without `.weight`.
    """

    name, exact = "exact", True

    def __init__(self, matrices: Matrices, decisions: Sequence[str]) -> None:
        self._matrices, self._decisions = matrices, decisions

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        gate = self._matrices.linear(self._decisions[layer], x)
        return Guess(self._matrices.backend.products(gate, span.skip, span.count) > 0, gate)


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

    truth: layer and FFN inputs `[tokens, hidden]` to decision products `[tokens, neurons]`.
    """

    name, exact = "oracle", True

    def __init__(self, matrices: Matrices, truth: Callable[[int, Floats], Floats]) -> None:
        self._matrices, self._truth = matrices, truth

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        tokens = self._matrices.backend.fetch(x)[span.skip : span.skip + span.count]
        return Guess(self._truth(layer, tokens) > 0)
