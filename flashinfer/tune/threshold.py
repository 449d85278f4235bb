"""Thresholds for SiLU and GELU GLU models: which neurons contribute too little to be read. Pure.

CATS (arXiv 2404.08763) keeps a neuron where |act(g)| exceeds one number per layer. What a neuron adds to the output is
act(g) * u * down, so, as CHESS (arXiv 2409.01366) does with the mean of |u|, each neuron n has a weight, w_n =
rms(u_n) * |down_n|, and is kept where |act(g)| * w_n > tau: its threshold is tau / w_n.

One tau per layer decides its density, and all layers get the same density. Measured on a SwiGLU model trained like the
embedded one, at the same mean density: one tau for all layers, or one in proportion to the layer's output or its root,
costs 1.3 to 1.7 times as much perplexity; taus that follow from what each layer costs alone save 2-7 % of the cost,
for as many more runs over the text as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = Callable[[int, int], Floats]

BLOCK = 256
"""Neurons looked at together."""
LARGEST = np.float32(1e30)
"""Threshold of a neuron that never contributes anything."""
_BIN_SHIFT = 12
"""Scores are counted by the upper bits of their float32, which are in order: bins 0.05 % wide."""
_BINS = 1 << (31 - _BIN_SHIFT)
_INFINITY = 0x7F800000 >> _BIN_SHIFT


@dataclass(frozen=True)
class GluLayer:
    """The FFN weights of a layer, some neurons at a time.

    activation: on float32 arrays. gate, up: rows first .. last, `[last - first, hidden]`; down: the columns of these
    neurons, likewise `[last - first, hidden]`. The biases are `[neurons]`, None where there are none.
    """

    neurons: int
    activation: Callable[[Floats], Floats]
    gate: Rows
    up: Rows
    down: Rows
    gate_bias: Floats | None = None
    up_bias: Floats | None = None

    def values(self, x: Floats, first: int, last: int) -> tuple[Floats, Floats]:
        """act(g) and u of some neurons for the inputs `x` `[tokens, hidden]`: both `[tokens, last - first]`."""
        gate, up = x @ self.gate(first, last).T, x @ self.up(first, last).T
        if self.gate_bias is not None:
            gate += self.gate_bias[first:last]
        if self.up_bias is not None:
            up += self.up_bias[first:last]
        return self.activation(gate), up


@dataclass(frozen=True)
class Scores:
    """How much the neurons of one layer contribute: what every threshold of the layer follows from.

    weights: w_n `[neurons]`. counts: pairs of a token and a neuron by score |act(g)| * w_n, in bins.
    """

    weights: Floats
    counts: npt.NDArray[np.int64]

    def tau(self, density: float) -> float:
        """The score above which that share of all pairs lies, to the width of a bin; 0 for a density of 1 or more."""
        above = np.cumsum(self.counts[::-1])[::-1]
        return _edge(int(np.count_nonzero(above > density * self.counts.sum())))

    def density(self, tau: float) -> float:
        """Share of all pairs above a score; those of score 0 are above none."""
        return float(self.counts[max(1, _bin(tau)) :].sum() / self.counts.sum())

    def thresholds(self, tau: float) -> Floats:
        """t of each neuron, `[neurons]`: it is kept where |act(g)| > t."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.weights > 0, np.float32(tau) / self.weights, LARGEST)
        return np.minimum(t, LARGEST).astype(np.float32)


def score_layer(layer: GluLayer, x: Floats) -> Scores:
    """Look at all neurons of a layer with sampled inputs. Memory: a block of neurons and their values, and the bins.

    Args:
        layer: the weights.
        x: `[tokens, hidden]`, sampled inputs of the FFN (after its norm); a memory map will do.

    Raises:
        ValueError: no samples.
    """
    if not len(x):
        raise ValueError("thresholds need samples")
    weights = np.zeros(layer.neurons, dtype=np.float32)
    counts = np.zeros(_BINS, dtype=np.int64)
    for first in range(0, layer.neurons, BLOCK):
        last = min(layer.neurons, first + BLOCK)
        act, up = layer.values(x, first, last)
        weights[first:last] = np.sqrt(np.square(up).mean(axis=0)) * np.linalg.norm(layer.down(first, last), axis=1)
        counts += np.bincount(_bins(np.abs(act) * weights[first:last]), minlength=_BINS)
    return Scores(weights, counts)


@dataclass(frozen=True)
class Trial:
    """A knob's setting and what it cost."""

    knob: float
    cost: float


def within_budget(
    cost: Callable[[float], float],
    budget: float,
    *,
    low: float,
    high: float,
    evaluations: int = 8,
    close: float = 0.85,
) -> tuple[Trial, ...]:
    """Turn one knob as far as a budget allows, with few evaluations. Returns all trials, the chosen one first.

    The cost grows with the knob, about as a power of it (perplexity does, with the fourth power of the share of neurons
    left out): the next setting is interpolated on logarithms, and kept away from both ends of the bracket, so that
    measurements that are not quite monotone cost evaluations but no correctness. The chosen trial was itself measured
    within the budget; it is the highest such knob below the lowest that was not.

    Args:
        cost: of a setting, for instance the relative increase of perplexity; expensive.
        budget: what it may be, above 0.
        low, high: ends of the knob, 0 < low < high; both are tried first.
        evaluations: of `cost`, at most; at least 2.
        close: ends early where the chosen trial uses this share of the budget.

    Raises:
        ValueError: an argument is out of its range, or even `low` costs more than the budget.
    """
    if not (budget > 0 and 0 < low < high and evaluations >= 2):
        raise ValueError(f"nothing to look for: budget {budget}, knob from {low} to {high}, {evaluations} evaluations")
    trials = [Trial(high, cost(high))]
    if trials[0].cost <= budget:
        return tuple(trials)
    bad, good = trials[0], Trial(low, cost(low))
    trials.append(good)
    if not good.cost <= budget:
        raise ValueError(f"even at {low} the cost is {good.cost:g}, above the budget of {budget:g}")
    while len(trials) < evaluations and good.cost < close * budget and bad.knob > 1.01 * good.knob:
        knob = _between(good, bad, budget)
        trials.append(Trial(knob, cost(knob)))
        good, bad = (trials[-1], bad) if trials[-1].cost <= budget else (good, trials[-1])
    return (good, *(t for t in trials if t is not good))


def _between(good: Trial, bad: Trial, budget: float) -> float:
    """Where the cost is expected to meet the budget, in the middle eight tenths of the bracket."""
    share = 0.5
    if 0 < good.cost < bad.cost < np.inf:
        share = float(np.log(budget / good.cost) / np.log(bad.cost / good.cost))
    return float(good.knob * (bad.knob / good.knob) ** min(0.9, max(0.1, share)))


def _bins(scores: Floats) -> npt.NDArray[np.int64]:
    """The bin of each score, flat; a score is not negative."""
    flat = np.ascontiguousarray(scores, dtype=np.float32).ravel()
    return (flat.view(np.uint32) >> _BIN_SHIFT).astype(np.int64)


def _bin(tau: float) -> int:
    return int(_bins(np.array([tau], dtype=np.float32))[0])


def _edge(index: int) -> float:
    """The least score of a bin."""
    return float(np.array([min(index, _INFINITY) << _BIN_SHIFT], dtype=np.uint32).view(np.float32)[0])
