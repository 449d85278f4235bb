"""What a low-rank predictor buys: for every shift of its scores, how many it names and how many it misses. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.tune.lowrank import Floats
from flashinfer.tune.samples import Mask

Counts = npt.NDArray[np.int64]

RECALLS: Final = (0.90, 0.95, 0.98, 0.99, 0.995)
"""Recalls a predictor is offered at."""
_DROPPED: Final = 14
"""Low bits of a float32 score that are not told apart, which leaves 512 bins to each power of two."""
BINS: Final = 1 << (32 - _DROPPED)
_SIGN: Final = np.uint32(1 << 31)


@dataclass(frozen=True)
class Operation:
    """A predictor at one shift.

    shift: added to the scores. recall: share of the (token, neuron) pairs that fired which are named, 1 where none did.
    density: share of all pairs that are named. over: named pairs to each that fired.
    """

    shift: float
    recall: float
    density: float
    over: float


class Frontier:
    """Counts of scores by size, of all (token, neuron) pairs and of those that fired: 4 MiB, for any number of samples.

    Bins follow the order of float32, so that what lies at the edge of a bin or above is counted exactly.
    """

    def __init__(self) -> None:
        self.pairs: Counts = np.zeros(BINS, dtype=np.int64)
        self.fired: Counts = np.zeros(BINS, dtype=np.int64)

    def add(self, scores: Floats, active: Mask) -> None:
        """Count scores, `[samples, neurons]`, and who fired."""
        bins = _bins(scores)
        self.pairs += np.bincount(bins.ravel(), minlength=BINS)
        self.fired += np.bincount(bins[active], minlength=BINS)

    def __add__(self, other: Frontier) -> Frontier:
        """Both together, for one shift of several layers."""
        both = Frontier()
        both.pairs, both.fired = self.pairs + other.pairs, self.fired + other.fired
        return both

    def reaching(self, recall: float) -> Operation:
        """The operation that names fewest with at least that recall, as finely as there are bins.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.pairs.any():
            raise ValueError("no scores were counted")
        need = math.ceil(recall * int(self.fired.sum()))
        if not need:
            return self._from(int(self.pairs.nonzero()[0][-1]) + 1)
        above = np.cumsum(self.fired[::-1])
        return self._from(BINS - 1 - int(np.searchsorted(above, need)))

    def at(self, shift: float) -> Operation:
        """What that shift does. Where it is not from `reaching`, scores in the bin it cuts count as not named."""
        return self._from(int(_bins(np.array(-shift, dtype=np.float32))) + 1)

    def _from(self, edge: int) -> Operation:
        """Naming the scores of this bin and of those above: all that are larger than the number just below it."""
        named, hits = int(self.pairs[edge:].sum()), int(self.fired[edge:].sum())
        fired = int(self.fired.sum())
        shift = -float(np.nextafter(_edge(edge), np.float32(-np.inf)))
        return Operation(shift, hits / fired if fired else 1.0, named / int(self.pairs.sum()), named / max(1, fired))


def _bins(scores: Floats) -> Counts:
    """The bin of each score: the upper bits of an integer that is ordered as the floats are."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0, which it is equal to
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (ordered >> np.uint32(_DROPPED)).astype(np.int64)


def _edge(number: int) -> np.float32:
    """The least score of a bin."""
    ordered = np.uint32(number << _DROPPED)
    bits = ordered ^ _SIGN if ordered & _SIGN else ~ordered
    return np.float32(bits.view(np.float32))
