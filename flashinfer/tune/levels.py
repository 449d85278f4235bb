"""Judging the levels of a trial store on held-out text: perplexity, who is named, and statistics for the planner."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from flashinfer.config import BackendName, Cap, RunConfig
from flashinfer.model.observe import Seen
from flashinfer.store import LayerStatistics, Level, Store
from flashinfer.tune.agreement import Counter, Inputs, Together
from flashinfer.tune.census import MaskFiles, count
from flashinfer.tune.collect import fit_span, sample_file
from flashinfer.tune.contribution import contribution_kept
from flashinfer.tune.greedy import Prompts
from flashinfer.tune.judge import Progress, Setup, opened
from flashinfer.tune.perplexity import Ids, Protocol, perplexity
from flashinfer.tune.samples import Samples
from flashinfer.tune.work import Work

BLOCK = 128
"""Samples taken at once."""
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


def with_recall(store: Store, work: Work, levels: Sequence[Level], backend: BackendName) -> list[Level]:
    """Levels of thresholds, with the share they keep of what all neurons add to the output: on samples that they were
    not fitted to, mean over the layers.

    store: with these thresholds. Raises StoreError, DiskFullError.
    """
    layers = range(store.manifest.facts.num_layers)
    with ExitStack() as files:
        samples = [files.enter_context(Samples(sample_file(work, layer))) for layer in layers]
        held_out = range(fit_span(samples[0].count).stop, samples[0].count)
        inputs = files.enter_context(Inputs(store, len(held_out)))
        for layer in layers:
            for block in samples[layer].blocks(held_out, BLOCK):
                inputs.seen(layer, Seen(block.x, block.x, block.active, None))
        kept = contribution_kept(store, inputs, [level.adjust for level in levels], backend)
    return [
        msgspec.structs.replace(level, recall=float(np.mean(shares)))
        for level, shares in zip(levels, kept, strict=True)
    ]


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
        with opened(store, name, self._setup) as (model, chunk), ExitStack() as files:
            exact = model.choice.level is None
            counter = Counter(model.facts, complete=exact)
            kinds = (["needed", "fired"] if exact else ["needed"]) if census else []
            masks = {
                kind: files.enter_context(MaskFiles(self._folder, kind, store, fired=kind == "fired")) for kind in kinds
            }
            model.observe(Together([counter, *masks.values()]))
            score = perplexity(model, self._ids, self._setup.protocol, chunk=chunk, progress=progress)
            model.observe(None)
        del model
        gc.collect()  # statistics take its place
        density = float(np.mean([named.density for named in counter.layers()]))
        found = {kind: count(store, mask.paths) for kind, mask in masks.items()}
        return Judged(score.perplexity, density, found.get("needed"), found.get("fired"))
