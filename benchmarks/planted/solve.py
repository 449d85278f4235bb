"""How much of each part a layer's neurons listen to, so that its firings have the statistics asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .statistics import WINDOW, Statistics, Thresholds, hot_share, window_shares

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

FINEST = 0.01


@dataclass(frozen=True)
class Mix:
    """Weights of a pre-activation's parts, each of variance 1: the token itself, the last few tokens, the last
    dozens, noise. `shift` is added to every threshold."""

    token: float
    short: float
    long: float
    noise: float
    shift: float

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """In the order of the parts."""
        return self.token, self.short, self.long, self.noise


@dataclass(frozen=True)
class Knobs:
    """slow: share of the predictable variance that comes from earlier tokens; long: share of that from dozens of
    them; spread: of the neurons' rates (see `Thresholds`)."""

    slow: float = 0.5
    long: float = 0.5
    spread: float = 1.0

    def near(self, step: float) -> Iterator[Knobs]:
        """The neighbours at that distance."""
        for name, value in vars(self).items():
            for moved in (value - step, value + step):
                if 0 <= moved <= (2 if name == "spread" else 1):
                    yield replace(self, **{name: moved})


class Solver:
    """Looks for the mix on samples of the parts, `[texts, tokens, neurons]` each."""

    def __init__(self, parts: Sequence[Floats], thresholds: Thresholds, asked: Statistics) -> None:
        self._parts, self._thresholds, self._asked = parts, thresholds, asked

    def mix(self, knobs: Knobs) -> tuple[Mix, Mask]:
        """The mix, and who fires under it: exactly as many as asked."""
        p, slow = self._asked.predictable, self._asked.predictable * knobs.slow
        weights = [float(s**0.5) for s in (p - slow, slow * (1 - knobs.long), slow * knobs.long, 1 - p)]
        margins = np.empty_like(self._parts[0])
        margins[:] = -self._thresholds.at(knobs.spread)
        for weight, part in zip(weights, self._parts, strict=True):
            margins += np.float32(weight) * part
        shift = np.quantile(margins, 1 - self._asked.density)
        return Mix(*weights, shift=float(shift)), margins > shift

    def solve(self, start: Knobs) -> tuple[Mix, Knobs]:
        """The best mix a pattern search finds, and where it was found."""
        at, step = start, 0.2
        best = self._miss(at)
        while step >= FINEST:
            miss, there = min(((self._miss(knobs), knobs) for knobs in at.near(step)), key=lambda tried: tried[0])
            if miss < best:
                best, at = miss, there
            else:
                step /= 2
        return self.mix(at)[0], at

    def _miss(self, knobs: Knobs) -> float:
        fired, asked = self.mix(knobs)[1], self._asked
        shares = np.mean([window_shares(text, WINDOW + 1) for text in fired], axis=0)
        hot = hot_share(fired.reshape(-1, fired.shape[-1]))
        found = (shares[WINDOW - 1], shares[WINDOW] - shares[WINDOW - 1], hot)
        wanted = (asked.window_share, asked.new_share, asked.hot_share)
        return sum(weight * (f / w - 1) ** 2 for weight, f, w in zip((1, 1, 0.1), found, wanted, strict=True))
