"""The two kinds of calibration: models with exact zeros get sketches and factors, gated ones without get thresholds."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.store import Level, Manifest, choose_bundles_per_record
from flashinfer.store.files import writing
from flashinfer.store.roles import lowrank_role
from flashinfer.tune.arrange import Arrangement, Conditions, arrange, least
from flashinfer.tune.collect import sample_file
from flashinfer.tune.fit import NUMPY, torch_arrays
from flashinfer.tune.job import Job, Made
from flashinfer.tune.layers import Fitted, Goal, bundled_bytes, fit_model, fitting_bytes, load_factors
from flashinfer.tune.order import Masks
from flashinfer.tune.rank import LADDER
from flashinfer.tune.rewrite import plan_rewrite, rewrite
from flashinfer.tune.samples import Samples
from flashinfer.tune.sketch import PredictorTensor, predictors_size, sketch_tensors, write_predictors
from flashinfer.tune.thresholds import BASE, fit_thresholds, thresholding_bytes
from flashinfer.tune.trial import untried

LEARNT = 4096
"""Tokens that orders are learnt from, at most."""
JUDGED = 512
"""Tokens that they are judged by, at most; a quarter of them only fills the slots."""
SLOTS = 0.25
"""Share of the neurons that the cache holds meanwhile (arXiv 2312.11514 keeps 24 %)."""
Index = npt.NDArray[np.int64]


def make_sparse(job: Job) -> Made:
    """Sketches, low-rank factors, decision matrices in the bundles, and neurons in the order that reads least.

    Raises:
        CapTooSmallError: a step takes more memory than the cap leaves. DiskFullError, StoreError: files cannot be
        written. PredictorError: factors do not fit their share.
    """
    goal = _goal(job)
    fitted = _fitted(job, goal) if "low-rank" in job.options.make else []
    found = [_arranged(job, i) for i in range(job.store.manifest.facts.num_layers)] if job.options.order else []
    tensors = [*sketch_tensors(job.store), *(t for f in fitted for t in _factor_tensors(job, goal, f))]
    manifest = _rewritten(job, found)
    return Made(_with_predictors(job, manifest, tensors), tuple(_levels(goal, fitted)))


def make_thresholds(job: Job) -> Made:
    """Thresholds, and records of a size for the density they leave.

    Raises:
        As `make_sparse`.
    """
    facts = job.store.manifest.facts
    job.check_room(thresholding_bytes(facts.hidden_size, job.options.tokens), "looking at a layer's weights")
    found = fit_thresholds(job.store, job.work, threads=job.run.threads, progress=job.telling("thresholds"))

    def level_at(density: float) -> Level:
        return untried("threshold", density, found.factors(density), 1.0, density)

    manifest = _for_density(job, BASE)
    levels = tuple(level_at(density) for density in job.options.densities)
    return Made(_with_predictors(job, manifest, found.tensors()), levels, level_at)


# -- low-rank factors


def _goal(job: Job) -> Goal:
    o = job.options
    budget = int(o.share * job.store.manifest.weight_bytes())
    return Goal(recall=o.recall, over=o.over, budget=budget, recalls=o.recalls, seed=o.seed)


def _fitted(job: Job, goal: Goal) -> list[Fitted]:
    facts = job.store.manifest.facts
    rank = max(r for r in LADDER if r == LADDER[0] or 2 * r <= min(facts.hidden_size, facts.intermediate_size))
    job.check_room(fitting_bytes(facts.hidden_size, facts.intermediate_size, rank, goal), "fitting a predictor")
    arrays = torch_arrays(job.device) if job.device != "cpu" else NUMPY
    return fit_model(job.store, job.work, goal, arrays=arrays, progress=job.telling("low-rank predictors"))


def _factor_tensors(job: Job, goal: Goal, fitted: Fitted) -> Iterator[PredictorTensor]:
    factors = load_factors(job.work, fitted)
    yield PredictorTensor.of(lowrank_role(fitted.layer, "a.weight"), factors.a, goal.codec)
    yield PredictorTensor.of(lowrank_role(fitted.layer, "b.weight"), factors.b, goal.codec)
    yield PredictorTensor.of(lowrank_role(fitted.layer, "b.bias"), factors.bias)


def _levels(goal: Goal, fitted: list[Fitted]) -> Iterator[Level]:
    """A level for each recall; over all layers, what it was measured to name."""
    for recall in goal.recalls if fitted else ():
        at = [f.at(goal, recall) for f in fitted]
        fired = [f.fired for f in fitted]
        reached = float(np.average([o.recall for o in at], weights=fired))
        yield untried("low-rank", recall, [o.shift for o in at], reached, float(np.mean([o.density for o in at])))


# -- where things lie


def _arranged(job: Job, layer: int) -> tuple[Index | None, int]:
    """The order of a layer's neurons (None: the original one) and the bundles per record that read least, on tokens
    that the order was not learnt from."""
    facts, step = job.store.manifest.facts, f"order of layer {layer}"
    path = job.work.path / f"layer-{layer}.order.npy"
    if (done := job.work.done(step)) is None:
        best = _best_arrangement(job, layer)
        with writing(path):
            np.save(path, np.arange(facts.intermediate_size) if best.order is None else best.order)
        done = {"moved": best.order is not None, "bundles": best.bundles_per_record}
        job.work.note(step, done)
    job.progress("neuron order", layer + 1, facts.num_layers)
    return (np.load(path) if done["moved"] else None), done["bundles"]


def _best_arrangement(job: Job, layer: int) -> Arrangement:
    facts, bundle = job.store.manifest.facts, bundled_bytes(job.store.manifest, layer)
    learn, judge = _masks(job, layer)
    conditions = Conditions(
        io=job.run.io, cache=job.run.cache, slot_bytes=int(SLOTS * bundle * facts.intermediate_size),
        alignment=job.store.manifest.alignment, warm=len(judge) // 4,
    )  # fmt: skip
    tried = arrange(learn, judge, bundle, neurons=facts.intermediate_size, conditions=conditions)
    return least(list(tried.values()), job.run.io)


def _masks(job: Job, layer: int) -> tuple[Masks, Masks]:
    """Who fired for the first tokens, and for the last ones."""
    with Samples(sample_file(job.work, layer)) as samples:
        judged = min(JUDGED, samples.count // 4)
        spans = range(min(LEARNT, samples.count - judged)), range(samples.count - judged, samples.count)
        learn, judge = ([np.packbits(b.active, axis=1) for b in samples.blocks(span, 256)] for span in spans)
        return np.concatenate(learn), np.concatenate(judge)


def _rewritten(job: Job, found: list[tuple[Index | None, int]]) -> Manifest:
    """The store with its decision matrices in the bundles, and neurons where they should be."""
    layers = job.store.manifest.facts.num_layers
    orders = [order for order, _ in found] or [None] * layers
    counts = [count for _, count in found] or None
    m = job.store.manifest
    job.update.require(plan_rewrite(m, decision="bundled", orders=orders, bundles_per_record=counts).need)
    return rewrite(
        job.store, job.update, decision="bundled", orders=orders, bundles_per_record=counts,
        progress=job.telling("rewriting the weights"),
    )  # fmt: skip


def _for_density(job: Job, density: float) -> Manifest:
    """The store with records of the size that suits such a density, which is another one than if all are read."""
    m = job.store.manifest
    counts = [
        choose_bundles_per_record(n.bundle_bytes, neurons=n.neurons, alignment=m.alignment, density=density)
        for n in m.layers
    ]
    if counts == [n.bundles_per_record for n in m.layers]:
        return m
    orders = [None if n.permutation is None else job.store.read_tensor(n.permutation) for n in m.layers]
    job.update.require(plan_rewrite(m, decision="separate", orders=orders, bundles_per_record=counts).need)
    return rewrite(
        job.store, job.update, decision="separate", orders=orders, bundles_per_record=counts,
        progress=job.telling("rewriting the weights"),
    )  # fmt: skip


def _with_predictors(job: Job, m: Manifest, tensors: list[PredictorTensor]) -> Manifest:
    job.update.require(predictors_size(m.facts, tensors))
    file, entries = write_predictors(job.update, tensors, job.telling("writing predictors"))
    kept = {role: t for role, t in m.tensors.items() if t.file == "dense"}
    return msgspec.structs.replace(m, predictors=file, tensors=kept | entries)
