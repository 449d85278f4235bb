"""`calibrate`: from a text to a store that knows who fires. Each step is kept until all are done."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from flashinfer import __distribution__, __version__
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import PredictorError, StoreError, TextError
from flashinfer.store import Calibration, LayerStatistics, Level, Manifest, Store, StoreUpdate, open_store
from flashinfer.text import load_tokenizer
from flashinfer.tune.collect import collect, sample_bytes
from flashinfer.tune.job import Job, Made, Progress
from flashinfer.tune.levels import Judge, Judged, with_recall
from flashinfer.tune.make import check_room, make_sparse, make_thresholds
from flashinfer.tune.mixture import count_experts
from flashinfer.tune.options import Options
from flashinfer.tune.perplexity import Ids, Protocol, bos_of
from flashinfer.tune.statistics import REPLAYED
from flashinfer.tune.text import TextTokens, read_tokens, split
from flashinfer.tune.threshold import within_budget
from flashinfer.tune.trial import Trial
from flashinfer.tune.work import Work, check_writable, work_bytes
from flashinfer.units import MIB

REFINED = 4
"""Thresholds tried between two levels to find the density that a perplexity allows."""
LEAST_SPARSITY = 0.02
"""What may be left out where every level costs more than is allowed."""
LEAST_TOKENS = 80
"""Of a text: statistics look back on 16 tokens, and a quarter of the text is held out for them."""


@dataclass(frozen=True)
class Report:
    """What a calibration came to. resumed: whether it went on with what an earlier one had done."""

    manifest: Manifest
    calibration: Calibration
    resumed: bool


def calibrate(
    path: Path, text: Path, options: Options, *, cap: Cap, run: RunConfig, device: str, progress: Progress
) -> Report:
    """Calibrate the store at `path` on a text. It changes all at once in the end, or not at all; what was done until an
    interruption is kept in the store's directory, and used by the next call with the same arguments.

    Args:
        cap: of the whole process, in every step.
        run: how models are run meanwhile, but for the predictor.

    Raises:
        TextError: the text cannot be used. PredictorError: the model cannot have such predictors.
        StoreBusyError: someone else changes the store. DiskFullError: no room.
        CapTooSmallError: the cap is too small for a step. Else what `Model` raises.
    """
    store = open_store(path)
    check_writable(store.root)
    if store.manifest.facts.experts is not None:
        return _count_experts(store, text, options, cap=cap, run=run, device=device, progress=progress)
    options = options.suited(store.manifest)
    context = min(options.context, store.manifest.facts.context_length)
    tokens, bos = _read(store, text, options, context)
    fit_ids, judge_ids = split(tokens.ids, min(options.held_out, len(tokens.ids) // 4))
    windows = -(-len(fit_ids) // (context - 1))  # each may begin with BOS
    need = sample_bytes(store.manifest.facts, len(fit_ids) + windows) - work_bytes(store.root)
    with StoreUpdate(store, need=max(0, need)) as update:
        work = Work(store.root, options.key(store.manifest, tokens.xxh3))
        job = Job(store, update, work, options, cap, run, device, bos, context, progress)
        try:
            report = _calibrate(job, fit_ids, judge_ids, tokens.xxh3)
        except StoreError:
            if work.resumed:
                work.remove()  # it may be what was kept that is damaged: the next one begins anew
            raise
        work.remove()
    return report


def _count_experts(
    store: Store, text: Path, options: Options, *, cap: Cap, run: RunConfig, device: str, progress: Progress
) -> Report:
    """Of a mixture of experts: statistics of at most as many tokens as are replayed, in one go."""
    if options.make:
        raise PredictorError(
            f"{store.root} is a mixture of experts: its router says who is needed, so there is no predictor to make; "
            "leave --predictor out"
        )
    context = min(options.context, store.manifest.facts.context_length)
    tokens, bos = _read(store, text, options, context)
    ids = tokens.ids[:REPLAYED]
    with StoreUpdate(store, need=MIB) as update:
        found = count_experts(
            store, ids, context=context, bos=bos, cap=cap, run=run, device=device,
            progress=partial(progress, "running the text"),
        )  # fmt: skip
        calibration = Calibration(f"{__distribution__} {__version__}", tokens.xxh3, len(ids), 0, {"router": found})
        Trial(update, store.manifest, calibration).commit(calibration)
    return Report(store.manifest, calibration, False)


def _read(store: Store, text: Path, options: Options, context: int) -> tuple[TextTokens, int | None]:
    """The tokens to use, and what each window of them begins with."""
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    found = read_tokens(text, tokenizer, options.tokens + options.held_out)
    least = max(min(2 * context, options.tokens + options.held_out), LEAST_TOKENS)
    if len(found.ids) < least:
        raise TextError(
            f"{text} has {len(found.ids)} tokens, calibration takes {least} at least; give a longer text, or a smaller "
            f"--context (now {context})"
        )
    return found, bos_of(tokenizer)


def _calibrate(job: Job, fit_ids: Ids, judge_ids: Ids, xxh3: str) -> Report:
    check_room(job)
    collect(
        job.store, fit_ids, job.work, context=job.context, bos=job.bos, run=job.run, device=job.device,
        cap=job.cap, progress=job.telling("running the text"),
    )  # fmt: skip
    made = make_sparse(job) if job.store.manifest.facts.sparse else make_thresholds(job)
    draft = Calibration(f"{__distribution__} {__version__}", xxh3, len(fit_ids), len(judge_ids), {})
    trial = Trial(job.update, made.manifest, draft)
    calibration = _judged(job, trial, made, judge_ids, draft)
    trial.commit(calibration)
    return Report(made.manifest, calibration, job.work.resumed)


def _judged(job: Job, trial: Trial, made: Made, ids: Ids, draft: Calibration) -> Calibration:
    """What the levels cost, which of them is used when nobody says, and statistics of that and of exact selection."""
    judge = _Judging(job, trial, made, ids)
    statistics = dict(judge.exact_statistics)
    levels = [judge.level(level) for level in made.levels]
    if made.level_at is not None:
        if job.options.density is None:
            levels += judge.refined(levels, made)
        levels = with_recall(trial.store(levels), job.work, levels, job.run.backend)
    if not levels:
        return msgspec.structs.replace(draft, statistics=statistics)
    chosen = choose(levels, job.options)
    kind = levels[chosen].predictor
    statistics[kind] = judge.census(levels, chosen)
    return msgspec.structs.replace(draft, statistics=statistics, levels=tuple(levels), chosen={kind: chosen})


def choose(levels: Sequence[Level], options: Options) -> int:
    """The level that is used when nobody says. A low-rank predictor: at the recall asked for. A threshold: at the
    density asked for, else the one that leaves out most within the perplexity allowed. Where nothing is within it, the
    level that costs least."""
    asked = options.recall if levels[0].predictor == "low-rank" else options.density
    if asked is not None:
        return min(range(len(levels)), key=lambda i: abs(levels[i].target - asked))
    good = [i for i, n in enumerate(levels) if n.perplexity <= n.exact_perplexity * (1.0 + options.max_ppl_increase)]
    if good:
        return min(good, key=lambda i: levels[i].density)
    return min(range(len(levels)), key=lambda i: levels[i].perplexity)


class _Judging:
    """Judges levels of a trial on held-out text; what is judged is kept by the work."""

    def __init__(self, job: Job, trial: Trial, made: Made, ids: Ids) -> None:
        protocol = Protocol(job.context, job.context - (job.bos is not None), job.bos)
        self._job, self._trial, self._levels = job, trial, made.levels
        self._judge = Judge(ids, protocol, job.cap, job.run, job.device, job.work.path)
        selects = job.store.manifest.facts.sparse
        exact = self._run("exact", made.levels, census=selects)
        self._exact = exact.perplexity
        self.exact_statistics = {
            kind: found
            for kind, found in (("exact", exact.fired), ("certified", exact.statistics))
            if found is not None
        }

    def level(self, level: Level) -> Level:
        """The level with its figures."""
        return self._run(_name(level), [level], census=False).level(level, self._exact)

    def refined(self, levels: list[Level], made: Made) -> list[Level]:
        """Levels between those two where the perplexity allowed lies, closer to it."""
        level_at, allowed = made.level_at, self._job.options.max_ppl_increase
        known = {level.target: level.perplexity / self._exact - 1.0 for level in levels}
        good = min((d for d in known if known[d] <= allowed), default=1.0)
        bad = max((d for d in known if known[d] > allowed and d < good), default=None)
        if level_at is None or bad is None or allowed <= 0:
            return []
        found: list[Level] = []

        def cost(sparsity: float) -> float:
            density = next((d for d in known if math.isclose(1.0 - d, sparsity)), round(1.0 - sparsity, 3))
            if density not in known:
                found.append(self.level(level_at(density)))
                known[density] = found[-1].perplexity / self._exact - 1.0
            return known[density]

        low = 1.0 - good if good < 1 else min(LEAST_SPARSITY, 0.5 - 0.5 * bad)
        with contextlib.suppress(ValueError):  # even the least costs too much
            within_budget(cost, allowed, low=low, high=1.0 - bad, evaluations=2 + REFINED)
        return found

    def census(self, levels: list[Level], chosen: int) -> tuple[LayerStatistics, ...]:
        """Statistics of whom the chosen level names."""
        level = levels[chosen]
        found = self._run(_name(level), [level], census=True, again=" and counting").statistics
        assert found is not None
        return found

    def _run(self, name: str, levels: Sequence[Level], *, census: bool, again: str = "") -> Judged:
        step = f"judging {name}{again}"
        if (done := self._job.work.done(step)) is None:
            progress = self._job.telling(step)
            judged = self._judge.run(self._trial.store(levels), name, census=census, progress=progress)
            done = msgspec.to_builtins(judged)
            self._job.work.note(step, done)
        return msgspec.convert(done, Judged)


def _name(level: Level) -> str:
    return f"{level.predictor}:{level.target:g}"
