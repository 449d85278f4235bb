"""Which neurons fire: what is asked of a synthetic model, and what is counted in a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

WINDOW = 5
HOTTEST = 0.1
"""The share of the neurons counted as hot."""
NORMAL = NormalDist()


@dataclass(frozen=True)
class Statistics:
    """What is asked, all as shares.

    density: of the FFN that fires for a token (1 - sparsity). window_share: of the FFN that fires for at least one
    of five consecutive tokens. new_share: of the FFN that fires for a token and for none of the five before.
    hot_share: of the firings in some 200 tokens that are those of the busiest tenth of the neurons. predictable: of
    the variance of a pre-activation that a low-rank part of the FFN input carries.
    """

    density: float
    window_share: float
    new_share: float
    hot_share: float = 0.45
    predictable: float = 0.8

    def __post_init__(self) -> None:
        alone, new = independent(self.density)
        for name, value in vars(self).items():
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        if not self.density < self.window_share < alone:
            raise ValueError(
                f"a window of {WINDOW} tokens that fire {self.density:.1%} each holds between {self.density:.1%} "
                f"and {alone:.1%} (were they independent) of the FFN; {self.window_share:.1%} cannot be had"
            )
        if not 0 < self.new_share < new:
            raise ValueError(f"a new token adds less than {new:.2%}; {self.new_share:.2%} cannot be had")

    def with_reuse(self, share: float) -> Statistics:
        """The same with that share of the reuse: 1 is all of it, towards 0 neurons fire independently at each token."""
        if not 0 < share <= 1:
            raise ValueError(f"the share of the reuse that is kept lies above 0 and is at most 1, not {share}")
        alone, new = independent(self.density)
        return replace(
            self,
            window_share=alone + share * (self.window_share - alone),
            new_share=new + share * (self.new_share - new),
        )


def independent(density: float) -> tuple[float, float]:
    """Window and new share if every neuron fired with the same probability, independently at each token."""
    silent = (1 - density) ** WINDOW
    return 1 - silent, density * silent


def like_trained(sparsity: float, window_share: float | None = None, new_share: float | None = None) -> Statistics:
    """Statistics of a given sparsity; what is not given lies below independence as in trained ReLU models."""
    window, new = independent(1 - sparsity)
    return Statistics(1 - sparsity, window_share or 0.72 * window, new_share or 0.55 * new)


FIRED = {"opt": Statistics(0.03, 0.10, 0.014), "llama": Statistics(0.05, 0.16, 0.022)}
"""By family. OPT-6.7B: 97 % sparse; llama: a ReLU-trained one, 95 %."""
LOADED = Statistics(0.096, 0.24, 0.024)
"""What the paper's runtime loads for OPT-6.7B: the set its predictor names, three times the one that fires."""


def window_shares(fired: Mask, longest: int = 10) -> Floats:
    """Mean share of neurons that fired in windows of 1 .. longest consecutive tokens, of `[tokens, neurons]`."""
    union, shares = fired, [fired.mean()]
    for k in range(1, min(longest, len(fired))):
        union = union[:-1] | fired[k:]
        shares.append(union.mean())
    return np.array(shares, dtype=np.float32)


def new_share(fired: Mask) -> float:
    """Mean share of neurons that fire for a token and for none of the `WINDOW` before it."""
    shares = window_shares(fired, WINDOW + 1)
    return float(shares[WINDOW] - shares[WINDOW - 1])


def hot_share(fired: Mask) -> float:
    """Share of the firings that belong to the `HOTTEST` neurons."""
    counts = np.sort(fired.sum(axis=0))[::-1]
    return float(counts[: round(HOTTEST * len(counts))].sum() / max(1, counts.sum()))


class Thresholds:
    """Thresholds for pre-activations of variance 1, such that the neurons' rates are log-normal.

    deviates: normal random numbers, one per neuron: who is hot.
    """

    def __init__(self, asked: Statistics, deviates: Floats) -> None:
        self._density, self._deviates = asked.density, deviates
        self._grid = np.linspace(-8, 3, 1101)
        self._log_tails = np.log([NORMAL.cdf(x) for x in self._grid])

    def at(self, spread: float) -> Floats:
        """Thresholds where rates differ by `spread` (the standard deviation of their logarithms)."""
        rates = np.exp(spread * self._deviates)
        for _ in range(10):
            rates = np.minimum(rates * (self._density / rates.mean()), 0.9)
        return -np.interp(np.log(rates), self._log_tails, self._grid).astype(np.float32)
