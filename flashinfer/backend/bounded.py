"""Which values are above bounds, and which may be where only a sketch of them is known. Pure.

In numpy what `Backend.exceeds` and `Backend.may_exceed` say.
"""

from __future__ import annotations

import numpy as np

from flashinfer.backend.base import Floats, Mask

UNDERFLOW = 2.0**-110
"""More than all that products and sums of float32 can lose by underflow, in a row of 2 ** 20 values."""
OVERFLOW = 2.0**100
"""A bound from which on products may have overflowed: nothing is certain."""
WIDER = 1.0 + 1e-9
"""Covers the rounding of the bound itself, which is computed in float64."""


def exceeds(values: Floats, high: Floats | float, between: tuple[Floats, Floats] | None = None) -> Mask:
    """Which values are above `high`, or above the first and below the second of `between`."""
    above: Mask = values > np.float32(high)
    return above if between is None else above | ((values > between[0]) & (values < between[1]))


def may_exceed(sketched: Floats, x: Floats, slack: Floats, bias: Floats | None, threshold: float = 0.0) -> Mask:
    """Whose product may be above a threshold, of the rows of a matrix and one token.

    sketched: products of the sketch's rows with the token `[rows]`. x: the token `[width]`. slack: `tune.sketch`
    has it: no more than `slack * |x|` lies between a product of the sketch and the one of the true row, however either
    is summed. Products and threshold are float32, so that the rounding of their bound in float64 hides nobody. What is
    not a number may be above.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        norm = float(np.sqrt(np.square(x, dtype=np.float64).sum())) * WIDER
        wide = np.multiply(slack, norm * WIDER, dtype=np.float64)
        wide[slack > 0] += UNDERFLOW
        top = wide + sketched
        if bias is not None:
            top += bias
        return ~(top <= np.float32(threshold)) | (wide >= OVERFLOW)
