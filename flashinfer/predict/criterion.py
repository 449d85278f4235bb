"""Who fires, decided on the decision product itself: where an activation exceeds a threshold. Pure.

SiLU and the GELUs fall from 0 to a dip below it and then rise for good. So |act(g)| > t is an upper range of g, and,
where t is less deep than the dip, an interval around that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flashinfer.store import Activation

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Words = npt.NDArray[np.int32]

FURTHEST = 1000.0
"""Beyond it below zero, every one of these activations vanishes in float64; above, it is its argument."""


def bounds(activation: Activation, threshold: Floats) -> tuple[Floats, Floats, Floats]:
    """`high`, `low`, `up`, all `[neurons]`: |act(g)| > t exactly where g > high or low < g < up, for float32 g.

    threshold: t of each neuron, at least 0. A neuron whose t the dip does not reach has an empty interval.

    Raises:
        ValueError: an activation without a dip, or a threshold below 0 or not a number.
    """
    act, wide = _ACTIVATIONS.get(activation), threshold.astype(np.float64)
    if act is None:
        raise ValueError(f"thresholds are for silu and gelu, not for {activation}")
    if not (wide >= 0).all():
        raise ValueError("a threshold is below 0 or not a number")
    dip = _dip(act)
    top = np.maximum(wide, 1.0) * 4.0
    high = _last(lambda g: act(g) <= wide, np.zeros_like(wide), top)
    low = _last(lambda g: -act(g) <= wide, np.full_like(wide, -FURTHEST), np.full_like(wide, dip))
    up = -_last(lambda g: -act(-g) <= wide, np.zeros_like(wide), np.full_like(wide, -dip))
    empty = -float(act(np.array([dip]))[0]) <= wide
    low[empty], up[empty] = 0.0, 0.0
    return high, low, up


def _last(holds: Callable[[Wide], npt.NDArray[np.bool_]], first: Wide, end: Wide) -> Floats:
    """The largest float32 in first .. end at which something holds that holds up to a point; `first` at the least."""
    good, bad = _number(first), _number(end)
    while True:
        middle = good + (bad - good) // 2
        if (middle == good).all():
            return _float(good)
        fine = holds(_float(middle).astype(np.float64))
        good, bad = np.where(fine, middle, good), np.where(fine, bad, middle)


def _number(values: Wide) -> npt.NDArray[np.int64]:
    """Float32 in order, counted through zero."""
    words = values.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(words < 0, -(words & 0x7FFFFFFF), words)


def _float(numbers: npt.NDArray[np.int64]) -> Floats:
    words = np.where(numbers < 0, (-numbers) | 0x80000000, numbers)
    return words.astype(np.uint32).view(np.float32)


def _dip(act: Callable[[Wide], Wide]) -> float:
    """Where the activation is least: on a grid, refined twice."""
    low, up = -3.0, 0.0
    for _ in range(4):
        grid = np.linspace(low, up, 2001)
        at = int(np.argmin(act(grid)))
        low, up = grid[max(0, at - 1)], grid[min(2000, at + 1)]
    return float((low + up) / 2)


def sigmoid(x: Wide) -> Wide:
    """1 / (1 + e^-x)."""
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _gelu(x: Wide) -> Wide:
    cdf = np.array([math.erfc(-v / math.sqrt(2.0)) for v in x]) / 2.0
    return np.asarray(x * cdf)


def _gelu_tanh(x: Wide) -> Wide:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    return np.asarray(x * sigmoid(2.0 * inner))  # (1 + tanh(y)) / 2 without the cancellation


_ACTIVATIONS: dict[Activation, Callable[[Wide], Wide]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
}
