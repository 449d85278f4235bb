"""Judging the levels of a trial store on held-out text: perplexity, who is named, and statistics for the planner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from flashinfer.config import Cap, RunConfig
from flashinfer.model.observe import Observer
from flashinfer.store import LayerStatistics, Level, Store
from flashinfer.tune.agreement import Counter, Together
from flashinfer.tune.census import MaskFiles, count
from flashinfer.tune.greedy import Prompts
from flashinfer.tune.judge import Progress, Setup, opened
from flashinfer.tune.perplexity import Ids, Protocol, perplexity

ASIDE = 8 << 20
"""Memory that an observer's masks and their files take."""


@dataclass(frozen=True)
class Judged:
    """perplexity, and the mean share of neurons that a token needs. statistics: by layer, of whom it needs; fired: of
    who fires, under exact selection."""

    perplexity: float
    density: float
    statistics: tuple[LayerStatistics, ...] | None = None
    fired: tuple[LayerStatistics, ...] | None = None

    def level(self, level: Level, exact: float) -> Level:
        """The level, with what it was measured to cost."""
        return msgspec.structs.replace(level, perplexity=self.perplexity, exact_perplexity=exact, density=self.density)


class Judge:
    """Runs trial stores over one text under one cap."""

    def __init__(self, ids: Ids, protocol: Protocol, cap: Cap, run: RunConfig, device: str, folder: Path) -> None:
        """folder: where masks lie meanwhile."""
        self._ids, self._folder = ids, folder
        self._setup = Setup(protocol, Prompts((), 0), cap, replace(run, predictor="exact"), device, ASIDE)

    def run(self, store: Store, name: str, *, census: bool, progress: Progress) -> Judged:
        """Score the text with that predictor; with `census` also count who is needed, and who fires where it is exact.

        Raises:
            CapTooSmallError, CapExceededError: see `judge.judge`. Else what `Model` raises.
        """
        with opened(store, name, self._setup) as (model, chunk):
            counter = Counter(model.facts, complete=model.choice.level is None)
            exact = census and model.choice.level is None
            needed, fired = (
                MaskFiles(self._folder, kind, store, fired=kind == "fired") for kind in ("needed", "fired")
            )
            with needed, fired:
                watching: list[Observer] = [counter]
                watching += [needed] if census else []
                watching += [fired] if exact else []
                model.observe(Together(watching))
                score = perplexity(model, self._ids, self._setup.protocol, chunk=chunk, progress=progress)
                model.observe(None)
        density = float(np.mean([named.density for named in counter.layers()]))
        return Judged(
            score.perplexity, density,
            count(store, needed.paths) if census else None, count(store, fired.paths) if exact else None,
        )  # fmt: skip
