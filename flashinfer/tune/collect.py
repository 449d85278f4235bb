"""Running a model over a text to see what comes into its feed-forward layers: samples of it on disk, layer by layer.

The text is run in parts, each kept when it is done: who is stopped goes on with the next one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.store import Facts, Store
from flashinfer.tune.samples import Collector, Samples, SampleWriter, sample_type
from flashinfer.tune.work import Work
from flashinfer.units import MIB, format_size

Ids = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

PART = 1024
"""Tokens of a part, at least; a part is whole windows."""
COPIED = 256
"""Samples copied at once when parts are joined."""
HELD_OUT = 8
"""One sample in so many, the last ones, is not fitted to but measured with."""


def sample_bytes(facts: Facts, tokens: int) -> int:
    """Room on disk that the samples of so many tokens take, all layers together, while parts are joined."""
    each = sample_type(facts.hidden_size, facts.intermediate_size).itemsize
    return (tokens * facts.num_layers + tokens) * each + MIB


def observing_bytes(facts: Facts, chunk: int) -> int:
    """Memory that collecting takes beside a model: what an observer is shown of a chunk, and what it makes of it."""
    return chunk * (12 * facts.hidden_size + 6 * facts.intermediate_size) + 2 * MIB


def sample_file(work: Work, layer: int) -> Path:
    """Where the samples of a layer are, once `collect` is done."""
    return work.path / f"layer-{layer}.samples"


def fit_span(count: int) -> range:
    """Which of so many samples are fitted to."""
    return range(count - count // HELD_OUT)


def collect(
    store: Store,
    ids: Ids,
    work: Work,
    *,
    context: int,
    bos: int | None,
    cap: Cap,
    run: RunConfig,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> None:
    """Sample every token of the text, run in windows of `context` tokens that begin anew, under exact selection.

    cap: of the whole process.

    Raises:
        StoreError, DiskFullError: samples cannot be written. CapTooSmallError: the cap is below the model's floor and
        what observing takes. Else what `Model` raises.
    """
    windows = windows_of(ids, context, bos)
    parts = _parts(windows)
    done = sum(len(windows[i]) for part in parts if work.done(_name(part)) for i in part)
    total = sum(map(len, windows))
    missing = [part for part in parts if not work.done(_name(part))]
    if missing and not work.done("samples"):
        size = observing_bytes(store.manifest.facts, run.prefill_chunk)
        with looked_at(store, cap, size, context=context, run=run, device=device) as model:
            for part in missing:
                _run_part(model, [windows[i] for i in part], work, part, partial(_further, progress, done, total))
                done += sum(len(windows[i]) for i in part)
                work.note(_name(part))
    _join(work, parts, store.manifest.facts)


@contextmanager
def looked_at(store: Store, cap: Cap, size: int, *, context: int, run: RunConfig, device: str) -> Iterator[Model]:
    """The model, with so many bytes left for observing it; without what was calibrated before, which may be damaged.

    Raises:
        CapTooSmallError: the cap is below the model's floor and that. Else what `Model` raises.
    """
    less = cap if cap.memory is None else replace(cap, memory=max(1, cap.memory - size))
    bare = Store(store.root, msgspec.structs.replace(store.manifest, sections={}))
    try:
        model = Model.open(bare, less, context=context, run=run, device=device)
    except CapTooSmallError as e:
        if cap.memory is None:
            raise
        floor = e.floor + size
        raise CapTooSmallError(
            f"a memory cap of {format_size(cap.memory)} is below the floor of {format_size(floor)} ({floor} bytes) for "
            "looking on while this model runs; raise the cap",
            floor,
        ) from e
    with model:
        yield model
    del model
    gc.collect()  # what is left of it would count against the next step


def _further(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def windows_of(ids: Ids, context: int, bos: int | None) -> list[Ids]:
    """The text in windows, each with BOS where there is one."""
    room = context - (bos is not None)
    start = [] if bos is None else [bos]
    return [np.concatenate([start, ids[i : i + room]]).astype(np.int64) for i in range(0, len(ids), room)]


def _parts(windows: Sequence[Ids]) -> list[range]:
    """Neighbouring windows of PART tokens together."""
    each = max(1, -(-PART // max(1, len(windows[0]))))
    return [range(i, min(i + each, len(windows))) for i in range(0, len(windows), each)]


def _name(part: range) -> str:
    return f"windows {part.start} to {part.stop}"


def _part_file(work: Work, part: range, layer: int) -> Path:
    return work.path / f"layer-{layer}.part-{part.start}"


def _run_part(model: Model, windows: Sequence[Ids], work: Work, part: range, progress: Callable[[int], None]) -> None:
    facts, total, done = model.facts, sum(map(len, windows)), 0
    with ExitStack() as files:
        writers = [
            files.enter_context(SampleWriter(_part_file(work, part, i), facts.hidden_size, facts.intermediate_size))
            for i in range(facts.num_layers)
        ]
        model.observe(Collector(writers, total, total))
        session = model.session()
        try:
            for window in windows:
                session.truncate(0)
                model.step(session, window.tolist())
                done += len(window)
                progress(done)
        finally:
            model.observe(None)
            session.close()


def _join(work: Work, parts: Sequence[range], facts: Facts) -> None:
    """One file for each layer; a part's files go as soon as their layer is whole."""
    for layer in range(facts.num_layers):
        if work.done(f"samples of layer {layer}"):
            continue
        with SampleWriter(sample_file(work, layer), facts.hidden_size, facts.intermediate_size) as out:
            for part in parts:
                with Samples(_part_file(work, part, layer)) as samples:
                    for block in samples.blocks(range(samples.count), COPIED):
                        out.add(block.x, block.active)
        work.note(f"samples of layer {layer}")
        for part in parts:
            _part_file(work, part, layer).unlink()
    work.note("samples")
