"""Exact selection from a sketch of the decision matrix: a neuron is left out only where it certainly does not fire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashinfer.backend import Buffer
from flashinfer.predict.base import Floats, Guess, Mask, Matrices, Span

UNDERFLOW = 2.0**-110
"""More than all that products and sums of float32 can lose by underflow, in a row of 2 ** 20 values."""
OVERFLOW = 2.0**100
"""A bound from which on products may have overflowed: nothing is certain."""
WIDER = 1.0 + 1e-9
"""Covers the rounding of the bound itself, which is computed in float64."""


def may_fire(sketched: Floats, x: Floats, slack: Floats, bias: Floats | None, threshold: float = 0.0) -> Mask:
    """Who may have a decision product above a threshold, of the neurons of a layer and one token.

    sketched: products of the sketch's rows with the token `[neurons]`. x: the token `[hidden]`. slack: `tune.sketch`
    has it: no more than `slack * |x|` lies between a product of the sketch and the one of the true row, however either
    is summed. Products and threshold are float32, so that the rounding of their bound in float64 hides nobody. What is
    not a number may fire.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        norm = float(np.sqrt(np.square(x, dtype=np.float64).sum())) * WIDER
        wide = np.multiply(slack, norm * WIDER, dtype=np.float64)
        wide[slack > 0] += UNDERFLOW
        top = wide + sketched
        if bias is not None:
            top += bias
        return ~(top <= np.float32(threshold)) | (wide >= OVERFLOW)


class Certified:
    """A sketch, an 8-bit copy of the decision matrix, bounds the products; the true rows in the bundles decide.

    sketches: role of each layer's sketch, without `.weight`. threshold: a neuron fires above it.
    """

    name, exact = "certified", True

    def __init__(self, matrices: Matrices, sketches: Sequence[str], threshold: float = 0.0) -> None:
        self._matrices, self._sketches, self._threshold = matrices, sketches, threshold
        self._slack: list[Floats] = []
        for role in sketches:
            slack = matrices.vector(f"{role}.slack")
            assert slack is not None
            self._slack.append(slack)
        self._bias = [matrices.vector(f"{role}.bias") for role in sketches]

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        backend = self._matrices.backend
        product = self._matrices.product(f"{self._sketches[layer]}.weight", x)
        pairs = zip(*(backend.products(y, span.skip, span.count) for y in (product, x)), strict=True)
        slack, bias = self._slack[layer], self._bias[layer]
        some = (may_fire(sketched, token, slack, bias, self._threshold) for sketched, token in pairs)
        return Guess(np.stack([*some]))
