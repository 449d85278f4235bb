"""One predictor scored on a text under a memory cap, alone or beside a reference."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from flashinfer import machine
from flashinfer.backend import open_backend
from flashinfer.choice import Choice
from flashinfer.config import TILE_TOKENS, Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapExceededError, CapTooSmallError
from flashinfer.io import open_reader
from flashinfer.model.observe import Observer
from flashinfer.request import files_of, settle, threads_for
from flashinfer.store import Facts, Store
from flashinfer.tune.agreement import Counter, Inputs, Named, Together
from flashinfer.tune.divergence import Distributions, Divergence
from flashinfer.tune.greedy import Prompts, common_prefixes, continue_all
from flashinfer.tune.perplexity import Ids, OnChunk, Protocol, Score, chunk_bytes, perplexity
from flashinfer.units import MIB, format_size

T = TypeVar("T")

MARGIN = 4 * MIB
"""For what is small: the masks of a chunk, progress, lists of tokens."""
GROWTH = 4 * MIB
"""What a process keeps of a model it had open, at most: code, and blocks of its allocator."""
Progress = Callable[[int, int], None]
"""Told of tokens done, scored or said, and tokens to do."""


@dataclass(frozen=True)
class Setup:
    """How a model is run to be judged. cap: what the user allows; scoring's own memory is part of a `memory` cap.
    aside: bytes of it for what else the process does. run: but for the predictor, and perhaps with smaller chunks."""

    protocol: Protocol
    prompts: Prompts
    cap: Cap
    run: RunConfig
    device: str = "cpu"
    aside: int = 0


@dataclass(frozen=True)
class Quality:
    """How one predictor did.

    asked: its name, as asked for; choice: what that came to. named: by layer. seconds: what judging took. Against a
    reference only: kl, agreement (`divergence.Divergence`), and prefixes, the tokens of each greedy continuation that
    the reference's has, too, before it first differs.
    """

    asked: str
    choice: Choice
    score: Score
    named: tuple[Named, ...]
    seconds: float
    kl: float | None = None
    agreement: float | None = None
    prefixes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For tables: with the level, where there is one."""
        level = self.choice.level
        return self.asked if level is None else f"{level.predictor}:{level.target:g}"


@dataclass(frozen=True)
class Reference:
    """What the others are held against: distributions of the same text, and what was said after each prompt."""

    distributions: Distributions
    said: Sequence[Sequence[int]]


def judge(
    store: Store, ids: Ids, name: str, setup: Setup, *, progress: Progress, reference: Reference | None = None
) -> Quality:
    """Score the text under that predictor, and hold it against the reference, if there is one.

    Raises:
        CapTooSmallError: the cap is below the floor, scoring's memory included. CapExceededError: it was broken.
        Else what `Model` raises.
    """
    started, steps = time.perf_counter(), _Steps(ids, setup, progress, alone=reference is None)
    with opened(store, name, setup) as (model, chunk):
        counter = Counter(model.facts, complete=not model.choice.approximates)
        if reference is None:
            score = _scored(model, ids, setup, chunk, counter, steps, None)
            return Quality(name, model.choice, score, counter.layers(), time.perf_counter() - started)
        divergence = Divergence(reference.distributions)
        score = _scored(model, ids, setup, chunk, counter, steps, divergence.add)
        prefixes = common_prefixes(model, setup.prompts, reference.said, steps.said)
        return Quality(
            name, model.choice, score, counter.layers(), time.perf_counter() - started,
            divergence.kl, divergence.agreement, prefixes,
        )  # fmt: skip


def judge_reference(
    store: Store, ids: Ids, name: str, setup: Setup, distributions: Distributions, inputs: Inputs | None,
    *, progress: Progress,
) -> tuple[Quality, Reference]:  # fmt: skip
    """Score the text under that predictor, and keep what others are held against. Raises as `judge`, and what the files
    of `distributions` and `inputs` raise."""
    started, steps = time.perf_counter(), _Steps(ids, setup, progress, alone=False)
    with opened(store, name, setup) as (model, chunk):
        counter = Counter(model.facts, complete=True)
        observer = counter if inputs is None else Together([counter, inputs])
        score = _scored(model, ids, setup, chunk, observer, steps, distributions.append)
        said = continue_all(model, setup.prompts, steps.said)
        quality = Quality(name, model.choice, score, counter.layers(), time.perf_counter() - started)
        return quality, Reference(distributions, said)


class _Steps:
    """Progress of scoring, then of saying."""

    def __init__(self, ids: Ids, setup: Setup, progress: Progress, *, alone: bool) -> None:
        self._scored, self._progress = setup.protocol.scored(len(ids)), progress
        self._total = self._scored + (0 if alone else len(setup.prompts.ids) * setup.prompts.tokens)

    def scored(self, done: int, _: int) -> None:
        self._progress(done, self._total)

    def said(self, done: int) -> None:
        self._progress(self._scored + done, self._total)


def check_peak(cap: Cap) -> None:
    """Hold the process's real peak against a `memory` cap. Raises CapExceededError."""
    peak = machine.peak_resident_bytes()
    if cap.memory is not None and peak > cap.memory:
        raise CapExceededError(
            f"the process grew to {format_size(peak)}, above its cap of {format_size(cap.memory)}; "
            "please report this with the output of --json"
        )


def reserve(facts: Facts, chunk: int) -> int:
    """Bytes that scoring takes beside a model that is run in chunks of so many tokens."""
    return chunk_bytes(facts.vocab_size, chunk) + 2 * chunk * max(map(facts.neurons, range(facts.num_layers))) + MARGIN


def check_floor(store: Store, name: str, setup: Setup) -> None:
    """Refuse beforehand a cap that is below the floor, or would be once others were judged by this process.

    Raises:
        CapTooSmallError: it is. PredictorError, StoreError, PromptError, DeviceError: see `Model.open`.
    """
    backend = open_backend(setup.device, threads_for(store.manifest, setup.run), setup.run.backend)
    reader = open_reader(files_of(store), setup.run.io)
    try:
        _with_room(
            store, name, setup, GROWTH,
            lambda cap, run: settle(store, reader, backend, cap, context=setup.protocol.context, run=run),
        )  # fmt: skip
    finally:
        reader.close()
        backend.close()


@contextmanager
def opened(store: Store, name: str, setup: Setup) -> Iterator[tuple[Model, int]]:
    """The model under that predictor, with room left for scoring, and the tokens of its chunks.

    Raises:
        CapTooSmallError, CapExceededError: see `judge`. Else what `Model.open` raises.
    """

    def open_model(cap: Cap, run: RunConfig) -> Model:
        return Model.open(store, cap, context=setup.protocol.context, run=run, device=setup.device)

    gc.collect()  # what is left of the model before would count against this one
    model, chunk = _with_room(store, name, setup, 0, open_model)
    with model:
        yield model, chunk
    check_peak(setup.cap)


def _scored(
    model: Model, ids: Ids, setup: Setup, chunk: int, observer: Observer, steps: _Steps,
    on_chunk: OnChunk | None,
) -> Score:  # fmt: skip
    model.observe(observer)
    score = perplexity(model, ids, setup.protocol, chunk=chunk, progress=steps.scored, on_chunk=on_chunk)
    model.observe(None)
    return score


def _with_room(
    store: Store, name: str, setup: Setup, more: int, attempt: Callable[[Cap, RunConfig], T]
) -> tuple[T, int]:
    """What `attempt` makes of the cap that is left beside scoring and `more` bytes, with the largest chunks it can."""
    chunk, memory = setup.run.prefill_chunk, setup.cap.memory
    while True:
        extra = setup.aside + reserve(store.manifest.facts, chunk) + more
        cap = setup.cap if memory is None else replace(setup.cap, memory=max(1, memory - extra))
        try:
            return attempt(cap, replace(setup.run, predictor=name, prefill_chunk=chunk)), chunk
        except CapTooSmallError as e:
            if memory is None:
                raise
            if chunk < 2 * TILE_TOKENS:
                raise _too_small(memory, e.floor + extra, setup.protocol.context) from e
        chunk //= 2


def _too_small(cap: int, floor: int, context: int) -> CapTooSmallError:
    return CapTooSmallError(
        f"a memory cap of {format_size(cap)} is below the floor of {format_size(floor)} ({floor} bytes) for scoring a "
        f"text with this model; raise the cap, or lower --context (now {context})",
        floor,
    )
