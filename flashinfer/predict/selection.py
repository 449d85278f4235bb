"""Selections from the decision product, and the two predictors that cannot be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """The neurons a step needs in one layer, by original index.

    needed: sorted union over the step's tokens. recent: the sorted sets of its last tokens, oldest first;
    empty for a single token, whose set is `needed`.
    """

    needed: Index
    recent: tuple[Index, ...] = ()


class Predictor(Protocol):
    """Names the active set. `wants_signs` says whether `positive` must be given."""

    wants_signs: bool

    def select(self, positive: Mask | None, neurons: int, window: int) -> Selection:
        """positive: `[tokens, neurons]`, the sign of the decision product; window: how many of the last
        tokens' own sets the cache looks at."""
        ...


class Exact:
    """Activations that vanish on non-positive inputs (ReLU family): the sign decides, nothing is guessed."""

    wants_signs = True

    def select(self, positive: Mask | None, neurons: int, window: int) -> Selection:
        assert positive is not None
        if len(positive) == 1:
            return Selection(np.flatnonzero(positive[0]))
        recent = tuple(np.flatnonzero(row) for row in positive[max(0, len(positive) - window) :])
        return Selection(np.flatnonzero(positive.any(axis=0)), recent)


class Everything:
    """Every neuron: activations that are never zero, and the naive baseline."""

    wants_signs = False

    def select(self, positive: Mask | None, neurons: int, window: int) -> Selection:
        return Selection(np.arange(neurons))
