"""Which experts the engine's router gives to each token of a text, and what of that a cache can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.bench.cache import Setting
from flashinfer.bench.replay import Step, misses
from flashinfer.config import CacheConfig
from flashinfer.engine import Model
from flashinfer.model.observe import Seen

from .locality import Mask, busiest, repeated, within

SHARES = (0.25, 0.4, 0.5)
"""Room for so much of the experts."""
POLICIES = (Setting("window + LFU", CacheConfig.window), Setting("LRU"), Setting("optimum"))
"""The runtime's default, and what it is held against."""


@dataclass(frozen=True)
class Routed:
    """One layer: who was chosen for each token, `[tokens, experts]`. The last `measured` tokens count, each a step of
    its own; the others, as one chunk, warm what is warmed."""

    chosen: Mask
    measured: int

    def summary(self) -> dict[str, Any]:
        """Plain numbers, all shares."""
        counted = self.chosen[-self.measured :]
        return {
            "repeated": repeated(counted),
            "within": within(counted),
            "busiest": busiest(counted),
            "hits": {f"{share:g}": {s.name: self.hit_rate(share, s) for s in POLICIES} for share in SHARES},
        }

    def hit_rate(self, share: float, setting: Setting) -> float:
        """Of the counted tokens' experts, the share that is in a slot when that share of the experts has one."""
        sets = [np.flatnonzero(row) for row in self.chosen]
        warm, counted = sets[: -self.measured], sets[-self.measured :]
        steps = [Step(tuple(warm), np.unique(np.concatenate(warm)), counted=False)] if warm else []
        steps += [Step((needed,), needed, counted=True) for needed in counted]
        experts = self.chosen.shape[1]
        missed = misses(setting.make(experts, round(share * experts), steps), steps)
        return 1 - missed / sum(len(needed) for needed in counted)


def measure_mixture(store: Path, ids: Sequence[int], measured: int) -> list[Routed]:
    """The layers of a store as the engine runs it: the last `measured` tokens one by one, the others as a prompt."""
    with Model.open(store, context=len(ids)) as model:
        watcher = _Watcher(model)
        model.observe(watcher)
        session = model.session()
        model.step(session, ids[:-measured])
        for token in ids[-measured:]:
            model.step(session, [token])
    return [Routed(np.concatenate(steps), measured) for steps in watcher.layers]


class _Watcher:
    """An observer that keeps, by layer and step, which experts each token got."""

    def __init__(self, model: Model) -> None:
        experts = model.facts.experts
        if experts is None:
            raise ValueError("that model has no experts; use synthetic.py")
        self._size, self._neurons = experts.size, experts.count * experts.size
        self.layers: list[list[Mask]] = [[] for _ in range(model.facts.num_layers)]

    def seen(self, layer: int, step: Seen) -> None:
        """See `model.observe.Observer`."""
        self.layers[layer].append(step.active[:, : self._neurons : self._size].copy())
