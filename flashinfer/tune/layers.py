"""Fitting the low-rank predictors of a model, layer by layer, each kept when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashinfer.config import PACK_BLOCK
from flashinfer.errors import PredictorError
from flashinfer.store import Facts, Manifest, Store
from flashinfer.store.roles import ffn_role
from flashinfer.tune.collect import fit_span, sample_file
from flashinfer.tune.fit import NUMPY, Arrays, Training, balance, train, train_bytes
from flashinfer.tune.frontier import RECALLS, Frontier, Operation
from flashinfer.tune.lowrank import Factors, Floats, closed_form, closed_form_bytes, stored
from flashinfer.tune.rank import CODEC, OVER, RECALL, Need, allocate, factor_bytes, ladder, next_rank, smallest
from flashinfer.tune.samples import Samples
from flashinfer.tune.sketch import decision_blocks
from flashinfer.tune.work import Work
from flashinfer.units import MIB, format_size

MEASURED = 256
"""Samples scored at once."""
FRONTIER = 8 * MIB
"""Counts of scores, and what makes them."""
DECISION_BLOCKS = 2 * PACK_BLOCK
"""Rows of a decision matrix on their way from the store."""
Progress = Callable[[int, int], None]
"""Told of layers done, and layers in all."""


@dataclass(frozen=True)
class Goal:
    """What the predictors are to reach. recall, over: at that recall, at most so many neurons named for each that
    fires. budget: bytes of all of them together. recalls: those they are offered at. memory: bytes that samples held
    for shuffling may take."""

    recall: float = RECALL
    over: float = OVER
    budget: int = 1 << 62
    recalls: tuple[float, ...] = RECALLS
    codec: str = CODEC
    memory: int = 64 * MIB
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A layer's predictor of one rank as it will be stored, and what it does on samples it was not trained on: an
    `Operation` for each of the goal's recalls."""

    layer: int
    rank: int
    fired: float
    operations: tuple[Operation, ...]

    def at(self, goal: Goal, recall: float) -> Operation:
        """What it does at that recall, one of the goal's."""
        return self.operations[goal.recalls.index(recall)]


def fit_model(
    store: Store,
    work: Work,
    goal: Goal,
    *,
    arrays: Arrays = NUMPY,
    fits: Callable[[int], bool] = lambda size: True,
    progress: Progress = lambda done, total: None,
) -> list[Fitted]:
    """The predictors of all layers, from the samples of `collect`. Factors are kept by the work (`load_factors`).

    Args:
        fits: whether there is memory for so many bytes; ranks that take more are not tried.

    Raises:
        PredictorError: not even the least predictors fit the budget. StoreError, DiskFullError: as reading the store
        and keeping results do.
    """
    facts = store.manifest.facts
    layers = range(facts.num_layers)
    ranks = _ranks(facts, work, goal, fits)
    size = {r: factor_bytes(facts.hidden_size, facts.intermediate_size, r, goal.codec) for r in ranks}
    if not ranks or size[ranks[0]] * facts.num_layers > goal.budget:
        raise PredictorError(
            f"low-rank predictors of {facts.num_layers} layers do not fit {format_size(goal.budget)}; raise --budget"
        )
    known: list[dict[int, Fitted]] = [{} for _ in layers]
    start = ranks[0]
    for i in layers:
        start = _search(store, work, goal, i, ranks, start, known[i], arrays)
        progress(i + 1, facts.num_layers)
    while True:
        needs = [
            _need(goal, ranks, size, known[i], facts.intermediate_size * bundled_bytes(store.manifest, i))
            for i in layers
        ]
        chosen = allocate(needs, goal.budget)
        missing = [i for i, rank in zip(layers, chosen, strict=True) if rank not in known[i]]
        if not missing:
            return [known[i][rank] for i, rank in zip(layers, chosen, strict=True)]
        for i in missing:
            known[i][chosen[i]] = _fit(store, work, goal, i, chosen[i], arrays)


def load_factors(work: Work, fitted: Fitted) -> Factors:
    """The factors of a layer."""
    data = work.kept(_name(fitted.layer, fitted.rank))
    return Factors(data["a"], data["b"], data["bias"])


def fitting_bytes(hidden: int, neurons: int, rank: int, goal: Goal) -> int:
    """Memory that fitting one layer takes, in bytes, at most."""
    closed = closed_form_bytes(hidden, neurons, rank, MEASURED)
    steps = train_bytes(hidden, neurons, rank, Training.batch) + goal.memory
    measured = 4 * MEASURED * (4 * neurons + 2 * hidden) + FRONTIER
    return max(closed, steps, measured) + DECISION_BLOCKS


def bundled_bytes(m: Manifest, layer: int) -> int:
    """Bytes of a bundle of that layer with its decision row in it, whether it is there yet or not."""
    size = m.layers[layer].bundle_bytes
    for part in ("weight", "bias"):
        t = m.tensors.get(ffn_role(layer, f"{m.facts.decision}.{part}"))
        size += 0 if t is None else t.bytes // t.shape[0]
    return size


def _ranks(facts: Facts, work: Work, goal: Goal, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """The ranks to try, which who is resumed tries again, however much memory there is then."""
    if (done := work.done("ranks")) is None:
        hidden, neurons = facts.hidden_size, facts.intermediate_size
        found = ladder(hidden, neurons, goal.budget // facts.num_layers * 4, goal.codec)
        done = [r for r in found if r == found[0] or fits(fitting_bytes(hidden, neurons, r, goal))]
        work.note("ranks", done)
    return tuple(done)


def _search(
    store: Store, work: Work, goal: Goal, layer: int, ranks: tuple[int, ...], start: int, known: dict[int, Fitted],
    arrays: Arrays,
) -> int:  # fmt: skip
    """Fit ranks until the smallest that is good enough is found; returns it."""
    while True:
        over = {rank: f.at(goal, goal.recall).over for rank, f in known.items()}
        rank = next_rank(ranks, over, goal.over, start)
        if rank is None:
            return smallest(ranks, over, goal.over)
        known[rank] = _fit(store, work, goal, layer, rank, arrays)


def _need(goal: Goal, ranks: tuple[int, ...], size: dict[int, int], known: dict[int, Fitted], layer_bytes: int) -> Need:
    over = {rank: f.at(goal, goal.recall).over for rank, f in known.items()}
    fired = next(iter(known.values())).fired
    return Need(ranks, smallest(ranks, over, goal.over), over, fired * layer_bytes, size)


def _fit(store: Store, work: Work, goal: Goal, layer: int, rank: int, arrays: Arrays) -> Fitted:
    """One layer at one rank, or what is known of it from before."""
    step = f"layer {layer}, rank {rank}"
    if (done := work.done(step)) is not None:
        return _from_plain(done)
    with Samples(sample_file(work, layer)) as samples:
        factors, fired = _trained(store, samples, goal, layer, rank, arrays)
        factors = stored(factors, goal.codec)
        frontier = Frontier()
        for block in samples.blocks(range(fit_span(samples.count).stop, samples.count), MEASURED):
            frontier.add(factors.score(block.x), block.active)
    fitted = Fitted(layer, rank, fired, tuple(frontier.reaching(recall) for recall in goal.recalls))
    work.keep(_name(layer, rank), a=factors.a, b=factors.b, bias=factors.bias)
    work.note(step, asdict(fitted))
    return fitted


def _trained(
    store: Store, samples: Samples, goal: Goal, layer: int, rank: int, arrays: Arrays
) -> tuple[Factors, float]:
    """Factors from the first samples, and the share of neurons that fire in them."""
    span = fit_span(samples.count)

    def rows() -> Iterator[Floats]:
        return (block for block, _ in decision_blocks(store, layer))

    def inputs() -> Iterator[Floats]:
        return (block.x for block in samples.blocks(span, MEASURED))

    biases = [bias for _, bias in decision_blocks(store, layer) if bias is not None]
    bias = np.concatenate(biases) if biases else None
    begin = closed_form(rows, bias, inputs, rank, hidden=samples.hidden, seed=goal.seed)
    fired = sum(int(np.count_nonzero(block.active)) for block in samples.blocks(span, MEASURED))
    density, training = fired / (len(span) * samples.neurons), Training()
    batches = samples.shuffled(span, training.batch, np.random.default_rng(goal.seed), goal.memory)
    steps = training.steps(len(span))
    return train(begin, batches, steps, weight=balance(density), training=training, arrays=arrays), density


def _name(layer: int, rank: int) -> str:
    return f"layer-{layer}.rank-{rank}"


def _from_plain(done: dict[str, Any]) -> Fitted:
    operations = tuple(Operation(**o) for o in done["operations"])
    return Fitted(done["layer"], done["rank"], done["fired"], operations)
