"""What `plan` promises: where the bytes of a cap go, how fast that will be, and what other caps would give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flashinfer.backend import open_backend
from flashinfer.bench.basis import DEFAULT_BASIS, Basis, measured_basis, room_under
from flashinfer.bench.place import Place, place_of
from flashinfer.choice import Choice
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import CapTooSmallError, StoreError
from flashinfer.io import open_reader
from flashinfer.memory import Plan, Request, conditions_of, resolve
from flashinfer.request import check_reader, files_of, settle, threads_for
from flashinfer.speed import Prediction, predict
from flashinfer.store import Manifest, open_store

PROMPT_TOKENS = 128
"""Length of the prompt whose first token is predicted, where nobody says (that of arXiv 2312.11514)."""
SAME = 0.03
"""Caps closer than this to each other are not compared."""


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


def promise(
    path: Path,
    cap: Cap,
    *,
    context: int | None,
    run: RunConfig,
    device: str = "cpu",
    remeasure: bool,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> Promise:
    """Plan and predict for a store, measuring what is not known yet (about `seconds` for the disk).

    Raises:
        StoreError, StoreReadError: the store cannot be used.
        CapTooSmallError: the asked cap, or that on a device, lies below the floor.
        CapTooLargeError, DeviceError, PlatformError: as `engine.Model.open`.
        PromptError: the context is beyond the model's.
    """
    from flashinfer.text import load_tokenizer

    check_reader(run.io.reader, device)
    store = open_store(path)
    m = store.manifest
    # what `generate` holds before it asks the resolver: the same cap must give the same plan
    tokenizer = None
    with contextlib.suppress(StoreError):  # a store without a tokenizer has a plan, too
        tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in m.text.items()})
    backend = open_backend(device, threads_for(m, run), run.backend)
    reader = open_reader(files_of(store), run.io)
    try:
        settled = settle(store, reader, backend, cap, context=context, run=run)
        plan, request = settled.plan, settled.request
        direct = reader.note
        basis = measured_basis(
            store, backend, run, room=room_under(cap), device=device, remeasure=remeasure, seconds=seconds,
            progress=progress,
        )  # fmt: skip
    finally:
        reader.close()
        backend.close()
        del tokenizer
    m, place = settled.subject.manifest, place_of(store.path_of(m.neurons))
    asked = Row(plan.cap, plan, _predict(m, request, plan, basis))
    others = tuple(_row(m, request, other, basis) for other in _other_caps(m, request, plan))
    return Promise(place, basis, asked, others, direct, settled.subject.choice)


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
    return replace(
        request,
        cap=replace(request.cap, **({"memory": size} if request.cap.memory is not None else {"weight_memory": size})),
    )


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
