"""What `plan` promises: where the bytes of a cap go, how fast that will be, and what other caps would give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashinfer import machine
from flashinfer.backend import has_native, open_backend
from flashinfer.bench.curve import measure_curve
from flashinfer.bench.known import KnownDisk, load_known, remember
from flashinfer.bench.place import Place, place_of
from flashinfer.bench.rates import BUFFER, ENOUGH, main_codec, measure_rates, rates_key
from flashinfer.choice import Choice
from flashinfer.config import Cap, DiskCurve, Rates, RunConfig
from flashinfer.errors import CapTooSmallError, StoreError
from flashinfer.io import open_reader
from flashinfer.memory import Plan, Request, conditions_of, resolve
from flashinfer.request import files_of, settle, threads_for
from flashinfer.speed import Prediction, predict
from flashinfer.store import Manifest, Store, open_store

PROMPT_TOKENS = 128
"""Length of the prompt whose first token is predicted, where nobody says (that of arXiv 2312.11514)."""
SAME = 0.03
"""Caps closer than this to each other are not compared."""


@dataclass(frozen=True)
class Basis:
    """What seconds are predicted from. `disk_source` and `rates_source` say where they come from, for people."""

    disk: DiskCurve
    rates: Rates
    disk_source: str
    rates_source: str
    disk_measured: bool

    def to_json(self) -> dict[str, Any]:
        """All fields, plain."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One cap: its plan and prediction, or the floor it lies below."""

    cap: int
    plan: Plan | None
    prediction: Prediction | None
    floor: int | None = None


@dataclass(frozen=True)
class Promise:
    """The asked cap, other caps beside it in ascending order, and what all of it rests on."""

    place: Place
    basis: Basis
    asked: Row
    others: tuple[Row, ...]
    direct: str
    choice: Choice


def known_basis(store: Store, run: RunConfig) -> Basis:
    """What was measured before, else the defaults, and labelled so. Measures nothing."""
    neurons = store.path_of(store.manifest.neurons)
    known = load_known()
    rates = known.rates.get(_rates_key(store.manifest, run))
    return _basis(known.disk(place_of(neurons), store.manifest.neurons.bytes), rates)


def _basis(disk: KnownDisk | None, rates: Rates | None) -> Basis:
    return Basis(
        disk=disk.curve if disk else DiskCurve(),
        rates=rates or Rates(),
        disk_source=f"measured {disk.when}" if disk else "default: not measured here",
        rates_source="measured" if rates else "default: not measured here",
        disk_measured=disk is not None,
    )


DEFAULT_BASIS = _basis(None, None)
"""What is assumed where nothing was measured."""


def _rates_key(m: Manifest, run: RunConfig) -> str:
    native = run.backend == "native" or (run.backend == "auto" and has_native())
    return rates_key("native" if native else "torch", _codec(m), threads_for(m, run))


def _codec(m: Manifest) -> str:
    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2:
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    return main_codec(sizes)


def promise(
    path: Path,
    cap: Cap,
    *,
    context: int | None,
    run: RunConfig,
    remeasure: bool,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> Promise:
    """Plan and predict for a store, measuring what is not known yet (about `seconds` for the disk).

    Raises:
        StoreError, StoreReadError: the store cannot be used.
        CapTooSmallError: the asked cap lies below the floor.
        PromptError: the context is beyond the model's.
    """
    from flashinfer.text import load_tokenizer

    store = open_store(path)
    m = store.manifest
    # what `generate` holds before it asks the resolver: the same cap must give the same plan
    tokenizer = None
    with contextlib.suppress(StoreError):  # a store without a tokenizer has a plan, too
        tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in m.text.items()})
    backend = open_backend("cpu", threads_for(m, run), run.backend)
    reader = open_reader(files_of(store), run.io)
    try:
        settled = settle(store, reader, backend, cap, context=context, run=run)
        plan, request = settled.plan, settled.request
        direct = reader.note
        disk, place = _disk_of(store.path_of(m.neurons), remeasure, seconds, _room(plan), progress)
        rates = None if remeasure else load_known().rates.get(_rates_key(m, run))
        if rates is None:
            progress("measuring memory and arithmetic")
            buffer = max(1, min(BUFFER, _room(plan)))
            rates = measure_rates(backend, _codec(m), hidden=m.facts.hidden_size, gated=m.facts.gated, buffer=buffer)
            if buffer >= ENOUGH:
                remember(rates=(_rates_key(m, run), rates))
    finally:
        reader.close()
        backend.close()
        del tokenizer
    basis, m = _basis(disk, rates), settled.subject.manifest
    asked = Row(plan.cap, plan, _predict(m, request, plan, basis))
    others = tuple(_row(m, request, other, basis) for other in _other_caps(m, request, plan))
    return Promise(place, basis, asked, others, direct, settled.subject.choice)


def _room(plan: Plan) -> int:
    """Bytes a measurement may take: half of what this process may still grow by, under the cap it asks about."""
    most = machine.usable_memory()
    if plan.cap_kind == "memory":
        most = min(most, plan.cap)
    return max(0, most - machine.resident_bytes()) // 2


def _disk_of(
    file: Path, remeasure: bool, seconds: float, room: int, progress: Callable[[str], None]
) -> tuple[KnownDisk | None, Place]:
    place = place_of(file)
    disk = None if remeasure else load_known().disk(place, file.stat().st_size)
    if disk is None:
        disk = measure_curve(file, seconds=seconds, room=room, progress=progress)
        if disk is not None:
            remember(disk=(place, disk))
    return disk, place


def _predict(m: Manifest, request: Request, plan: Plan, basis: Basis) -> Prediction:
    tokens = max(1, min(PROMPT_TOKENS, plan.context - 1))
    return predict(conditions_of(m, request, basis.disk, basis.rates), plan, prompt_tokens=tokens)


def _row(m: Manifest, request: Request, cap: int, basis: Basis) -> Row:
    try:
        plan = resolve(m, _with_cap(request, cap))
    except CapTooSmallError as e:
        return Row(cap, None, None, e.floor)
    return Row(cap, plan, _predict(m, request, plan, basis))


def _with_cap(request: Request, size: int) -> Request:
    return replace(request, cap=Cap(memory=size) if request.cap.memory is not None else Cap(weight_memory=size))


def _other_caps(m: Manifest, request: Request, plan: Plan) -> list[int]:
    """Half the cap, the floor, steps up from it, and what holds the whole model; none twice, nor the cap itself."""
    floor = _row(m, request, 1, DEFAULT_BASIS).floor or 1
    whole = resolve(m, _with_cap(request, 1 << 60)).total
    steps = (floor + (whole - floor) * i // 4 for i in range(1, 4))
    caps: list[int] = []
    for cap in sorted({max(1, min(floor - floor // 10, plan.cap // 2)), floor, *steps, whole}):
        if all(abs(cap - other) > SAME * cap for other in (*caps, plan.cap)):
            caps.append(cap)
    return caps
