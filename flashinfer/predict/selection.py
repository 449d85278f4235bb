"""Selections: what a step asks of the cache, from what its tokens need."""

from __future__ import annotations

from dataclasses import dataclass

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


def select(needed: Mask | None, neurons: int, window: int) -> Selection:
    """needed: `[tokens, neurons]`, None for all; window: how many of the last tokens' own sets the cache looks at."""
    if needed is None:
        return Selection(np.arange(neurons))
    if len(needed) == 1:
        return Selection(np.flatnonzero(needed[0]))
    recent = tuple(np.flatnonzero(row) for row in needed[max(0, len(needed) - window) :])
    return Selection(np.flatnonzero(needed.any(axis=0)), recent)
