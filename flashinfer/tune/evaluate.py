"""What predictors cost in quality: each scored on the same text, and held against an exact run of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from flashinfer.config import BackendName
from flashinfer.store import Approximate, Store
from flashinfer.tune.agreement import Inputs, lowrank_named
from flashinfer.tune.candidates import Candidates, approximates
from flashinfer.tune.contribution import contribution_kept
from flashinfer.tune.divergence import Distributions
from flashinfer.tune.judge import Quality, Setup, check_floor, judge, judge_reference
from flashinfer.tune.perplexity import Ids

Progress = Callable[[str, int, int], None]
"""Told of the predictor that is run, tokens done, and tokens to do with it."""


def evaluate(
    store: Store, ids: Ids, who: Candidates, setup: Setup, progress: Progress, *, reference: Store | None = None
) -> list[Quality]:
    """Judge the reference, if there is one, then each of the others, one after the other.

    reference: the store that `who.against` is run on; None is the same one. With another nobody's recall is known.

    Raises:
        CapTooSmallError, CapExceededError: see `judge`.
        DiskFullError: no room for what the others are held against. Else what `Model` raises.
    """
    base = reference or store
    for at, name in [*([(base, who.against)] if who.against is not None else ()), *((store, n) for n in who.others)]:
        check_floor(at, name, setup)
    if who.against is None:
        return [judge(store, ids, name, setup, progress=partial(progress, name)) for name in who.others]
    with ExitStack() as files:
        distributions = files.enter_context(Distributions(store, setup.protocol.scored(len(ids))))
        inputs = None
        if reference is None and any(map(approximates, who.others)):
            inputs = files.enter_context(Inputs(store, setup.protocol.run(len(ids))))
        first, held = judge_reference(
            base, ids, who.against, setup, distributions, inputs, progress=partial(progress, who.against)
        )
        others = [
            judge(store, ids, name, setup, progress=partial(progress, name), reference=held) for name in who.others
        ]
        return [first, *(others if inputs is None else with_recall(store, inputs, others, setup.run.backend))]


def with_recall(store: Store, inputs: Inputs, found: list[Quality], backend: BackendName) -> list[Quality]:
    """What approximations miss, on the inputs that exact selection gives. (On their own inputs, who would have fired is
    not known of those they do not name.)

    Raises:
        StoreError, StoreReadError: what it is computed from is damaged, or cannot be read.
    """
    named = {q.name: q.named for q in found}
    if levels := _levels(found, "low-rank"):
        named |= zip(levels, lowrank_named(store, inputs, list(levels.values())), strict=True)
    if levels := _levels(found, "threshold"):
        for name, shares in zip(levels, contribution_kept(store, inputs, list(levels.values()), backend), strict=True):
            named[name] = tuple(replace(n, recall=share) for n, share in zip(named[name], shares, strict=True))
    return [replace(q, named=named[q.name]) for q in found]


def _levels(found: list[Quality], kind: Approximate) -> dict[str, tuple[float, ...]]:
    """What the levels of that predictor adjust, by name."""
    return {q.name: q.choice.level.adjust for q in found if q.choice.level is not None and q.choice.kind == kind}
