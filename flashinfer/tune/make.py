"""The two kinds of calibration: models with exact zeros get sketches and factors, gated ones without get thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.config import PACK_BLOCK
from flashinfer.store import Level, Manifest, choose_bundles_per_record
from flashinfer.store.roles import lowrank_role
from flashinfer.tune.arrange import Arrangement, Conditions, arrange, least
from flashinfer.tune.collect import sample_file
from flashinfer.tune.fit import NUMPY, Training, torch_arrays
from flashinfer.tune.job import Job, Made
from flashinfer.tune.layers import Fitted, Goal, bundled_bytes, fit_model, fitting_bytes, load_factors
from flashinfer.tune.order import EDGES, Masks
from flashinfer.tune.rank import LADDER
from flashinfer.tune.rewrite import plan_rewrite, rewrite
from flashinfer.tune.samples import Samples, sample_type
from flashinfer.tune.sketch import PredictorTensor, predictors_size, sketch_tensors, write_predictors
from flashinfer.tune.statistics import counter_bytes
from flashinfer.tune.thresholds import BASE, fit_thresholds, thresholding_bytes
from flashinfer.tune.trial import untried
from flashinfer.units import MIB

LEARNT = 4096
"""Tokens that orders are learnt from, at most."""
FIRINGS = 512
"""And at most so many that a neuron fires for, on average: what bisecting takes grows with them."""
JUDGED = 512
"""Tokens that they are judged by, at most; a quarter of them only fills the slots."""
SLOTS = 0.25
"""Share of the neurons that the cache holds meanwhile (arXiv 2312.11514 keeps 24 %)."""
REWRITING = 4 * PACK_BLOCK
"""Memory that writing the weights anew takes, in bytes, at most."""
Index = npt.NDArray[np.int64]


def make_sparse(job: Job) -> Made:
    """Sketches, low-rank factors, decision matrices in the bundles, and neurons in the order that reads least.

    Raises:
        CapTooSmallError: a step takes more memory than the cap leaves. DiskFullError, StoreError: files cannot be
        written. PredictorError: factors do not fit their share.
    """
    check_sparse(job)
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
    check_thresholds(job)
    found = fit_thresholds(job.store, job.work, threads=job.run.threads, progress=job.telling("thresholds"))

    def level_at(density: float) -> Level:
        return untried("threshold", density, found.factors(density), 1.0, density)

    manifest = _for_density(job, BASE)
    levels = tuple(level_at(density) for density in job.options.densities)
    return Made(_with_predictors(job, manifest, found.tensors()), levels, level_at)


# -- memory


def check_room(job: Job) -> None:
    """Refuse a cap before anything is run if a step takes more. Raises CapTooSmallError."""
    facts = job.store.manifest.facts
    (check_sparse if facts.sparse else check_thresholds)(job)
    job.check_room(counter_bytes(facts.intermediate_size, facts.intermediate_size), "counting who is needed")


def check_sparse(job: Job) -> None:
    """Room for the steps of `make_sparse`, and the least predictors. Raises CapTooSmallError."""
    facts = job.store.manifest.facts
    if "low-rank" in job.options.make:
        least = fitting_bytes(facts.hidden_size, facts.intermediate_size, LADDER[0], _goal(job))
        job.check_room(least, "fitting a predictor")
    if job.options.order:
        job.check_room(ordering_bytes(facts.intermediate_size), "ordering neurons (which --no-order does without)")
    job.check_room(REWRITING, "rewriting the weights")


def check_thresholds(job: Job) -> None:
    """Room for the steps of `make_thresholds`. Raises CapTooSmallError."""
    hidden = job.store.manifest.facts.hidden_size
    job.check_room(thresholding_bytes(hidden, job.options.tokens), "looking at a layer's weights")
    job.check_room(REWRITING, "rewriting the weights")


def ordering_bytes(neurons: int) -> int:
    """Memory that ordering the neurons of a layer takes, in bytes, at most: the links of each, or its firings, and the
    masks."""
    return neurons * max(300 * EDGES, 48 * FIRINGS) + (LEARNT + JUDGED) * neurons // 4 + 8 * MIB


# -- low-rank factors


def _goal(job: Job) -> Goal:
    o, facts = job.options, job.store.manifest.facts
    samples = (o.tokens + Training.batch) * sample_type(facts.hidden_size, facts.intermediate_size).itemsize
    budget = int(o.share * job.store.manifest.weight_bytes())
    memory = min(Goal.memory, samples)
    return Goal(recall=o.recall, over=o.over, budget=budget, recalls=o.recalls, memory=memory, seed=o.seed)


def _fitted(job: Job, goal: Goal) -> list[Fitted]:
    return fit_model(
        job.store, job.work, goal, arrays=torch_arrays(job.device) if job.device != "cpu" else NUMPY,
        fits=job.has_room, progress=job.telling("low-rank predictors"),
    )  # fmt: skip


def _factor_tensors(job: Job, goal: Goal, fitted: Fitted) -> Iterator[PredictorTensor]:
    """Of one layer; its factors are loaded when they are written."""
    facts = job.store.manifest.facts

    def tensor(name: str, part: str, codec: str, *shape: int) -> PredictorTensor:
        role = lowrank_role(fitted.layer, part)

        def chunks() -> Iterable[memoryview]:
            return PredictorTensor.of(role, getattr(load_factors(job.work, fitted), name), codec).chunks()

        return PredictorTensor(role, codec, shape, chunks)

    yield tensor("a", "a.weight", goal.codec, fitted.rank, facts.hidden_size)
    yield tensor("b", "b.weight", goal.codec, facts.intermediate_size, fitted.rank)
    yield tensor("bias", "b.bias", "f32", facts.intermediate_size)


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
    name = f"layer-{layer}.order"
    if (done := job.work.done(step)) is None:
        best = _best_arrangement(job, layer)
        if best.order is not None:
            job.work.keep(name, order=best.order)
        done = {"moved": best.order is not None, "bundles": best.bundles_per_record}
        job.work.note(step, done)
    job.progress("neuron order", layer + 1, facts.num_layers)
    return (job.work.kept(name)["order"] if done["moved"] else None), done["bundles"]


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
    learn, fired = [], 0
    with Samples(sample_file(job.work, layer)) as samples:
        judged = min(JUDGED, samples.count // 4)
        for block in samples.blocks(range(min(LEARNT, samples.count - judged)), 256):
            learn.append(np.packbits(block.active, axis=1))
            fired += int(np.count_nonzero(block.active))
            if fired >= FIRINGS * samples.neurons:
                break
        span = range(samples.count - judged, samples.count)
        judge = [np.packbits(block.active, axis=1) for block in samples.blocks(span, 256)]
    return np.concatenate(learn), np.concatenate(judge)


def _rewritten(job: Job, found: list[tuple[Index | None, int]]) -> Manifest:
    """The store with its decision matrices in the bundles, and neurons where they should be."""
    orders = [order for order, _ in found] or _orders(job)
    counts = [count for _, count in found] or None
    m = job.store.manifest
    job.update.require(plan_rewrite(m, decision="bundled", orders=orders, bundles_per_record=counts).need)
    return rewrite(
        job.store, job.update, decision="bundled", orders=orders, bundles_per_record=counts,
        progress=job.telling("rewriting the weights"),
    )  # fmt: skip


def _orders(job: Job) -> list[Index | None]:
    """The orders there are now."""
    roles = [layer.permutation for layer in job.store.manifest.layers]
    return [None if role is None else job.store.read_tensor(role).astype(np.int64) for role in roles]


def _for_density(job: Job, density: float) -> Manifest:
    """The store with its decision matrices apart, and records of the size that suits such a density, which is another
    one than if all are read."""
    m, orders = job.store.manifest, _orders(job)
    counts = [
        choose_bundles_per_record(n.bundle_bytes, neurons=n.neurons, alignment=m.alignment, density=density)
        for n in plan_rewrite(m, decision="separate", orders=orders).draft.layers
    ]
    if [("separate", count) for count in counts] == [(n.decision, n.bundles_per_record) for n in m.layers]:
        return m
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
