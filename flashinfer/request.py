"""What the resolver is asked, of this machine and this process as they are now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flashinfer import machine
from flashinfer.adapter import StoreAdapter, read_adapter
from flashinfer.backend import Backend
from flashinfer.choice import Choice, choices, restricted, under_adapter
from flashinfer.config import DEVICE_RATES, Cap, Rates, ReaderName, RunConfig
from flashinfer.errors import CapTooLargeError, CapTooSmallError, DeviceError, PromptError
from flashinfer.firing import firing_of
from flashinfer.io import Reader
from flashinfer.memory import (
    AdapterNeeds,
    DeviceMemory,
    Mode,
    Plan,
    Request,
    check_device_floor,
    conditions_of,
    resolve,
)
from flashinfer.speed import predict
from flashinfer.store import Calibration, Facts, Manifest, Store
from flashinfer.units import MIB, format_size

SMALL_MODEL = 64 * MIB
"""Below this many weight bytes a second compute thread costs scratch and saves nothing."""
DEFAULT_CONTEXT = 4096
"""Context of a session when nobody says, if the model's own is not smaller."""
SAFE_SHARE = 0.9
"""Share of the usable memory taken when no cap is given."""
UNCAPPED = Cap()


def threads_for(manifest: Manifest, run: RunConfig) -> int:
    """Compute threads: as asked, else all cores for a model that is worth it."""
    return run.threads or (machine.compute_threads() if manifest.weight_bytes() > SMALL_MODEL else 1)


@dataclass(frozen=True)
class Subject:
    """A store as a run sees it: the manifest without what the run does not use, the predictor that it does, and the
    adapter."""

    manifest: Manifest
    choice: Choice
    calibration: Calibration | None
    adapter: StoreAdapter | None = None


def subjects_of(store: Store, run: RunConfig, mode: Mode) -> list[Subject]:
    """What the predictor that is asked for allows, exact ones first: one, but for `auto`.

    Raises:
        PredictorError: the store does not have it. StoreError: the calibration is damaged.
        CheckpointError: the adapter is damaged, or for another model.
    """
    calibration, m = store.calibration(), store.manifest
    adapter = None if run.adapter is None else read_adapter(run.adapter, store)
    if mode == "naive":
        found = [Choice("all")]
    elif adapter is not None:
        found = [under_adapter(m, run.predictor, adapter.decides)]
    else:
        found = choices(m, calibration, run.predictor, run.max_ppl_increase)
    return [Subject(restricted(m, choice), choice, calibration, adapter) for choice in found]


def files_of(store: Store) -> list[Path]:
    """The files a reader opens, in the order in which the weights number them."""
    m = store.manifest
    return [store.path_of(entry) for entry in (m.dense, m.neurons, m.predictors) if entry is not None]


@dataclass(frozen=True)
class Settled:
    """What a run is: of what, under which request, and how the cap is spent."""

    subject: Subject
    request: Request
    plan: Plan


def settle(
    store: Store,
    reader: Reader,
    backend: Backend,
    cap: Cap,
    *,
    context: int | None,
    run: RunConfig,
    mode: Mode = "cached",
) -> Settled:
    """The predictor and the plan of a run; of several that are allowed the one predicted fastest, of equals the first.

    Raises:
        PredictorError: the store has none such. PromptError: a context beyond the model's.
        CheckpointError: the adapter is damaged, or for another model.
        CapTooSmallError: the cap, or what may be used of a device, is below the floor of all of them.
        CapTooLargeError: `cap.vram` is more than is free on the device. DeviceError: there is none to bound.
    """
    found, error = [], None
    for subject in subjects_of(store, run, mode):
        request = request_for(subject, reader, backend, cap, context=context, run=run, mode=mode)
        try:
            found.append(Settled(subject, request, resolve_cap(subject.manifest, request, asked=cap.asked)))
        except CapTooSmallError as e:
            error = error if error is not None and error.floor < e.floor else e
    if not found:
        assert error is not None
        raise error
    return found[0] if len(found) == 1 else min(found, key=_token_seconds)


def _token_seconds(s: Settled) -> float:
    c = conditions_of(s.subject.manifest, s.request, s.request.run.io.disk, s.request.run.rates)
    return predict(c, s.plan, prompt_tokens=1).token_seconds


def request_for(
    subject: Subject,
    reader: Reader,
    backend: Backend,
    cap: Cap,
    *,
    context: int | None,
    run: RunConfig,
    mode: Mode,
) -> Request:
    """What the resolver is asked, of this process as it is now: what it holds already counts against the cap.

    Raises:
        PromptError: a context beyond the model's. CapTooLargeError, DeviceError: as `settle`.
    """
    device = device_memory(backend, cap.vram)
    if not cap.asked:
        cap = Cap(memory=int(machine.usable_memory() * SAFE_SHARE), vram=cap.vram)
    if device is not None and run.rates == Rates():
        run = replace(run, rates=DEVICE_RATES)
    return Request(
        context=_context(subject.manifest.facts, context),
        threads=backend.threads,
        alignment=reader.alignment,
        baseline=machine.resident_bytes(),
        run=run,
        cap=cap,
        mode=mode,
        footprint=backend.footprint,
        choice=subject.choice,
        firing=firing_of(subject.manifest, subject.choice, subject.calibration),
        adapter=AdapterNeeds() if subject.adapter is None else subject.adapter.needs,
        device=device,
    )


def check_reader(reader: ReaderName, device: str) -> None:
    """Raises DeviceError where the reader is for a device of which the run has none."""
    if reader == "kvikio" and device == "cpu":
        raise DeviceError(
            "--reader kvikio reads to a device's own memory, and the CPU has none; leave it out, or add --device cuda"
        )


def device_memory(backend: Backend, asked: int | None) -> DeviceMemory | None:
    """What may be used of the backend's own memory; None where it computes on the host's.

    Raises:
        CapTooLargeError: more is asked for than is free there. DeviceError: there is none, and some is asked for.
    """
    copies = backend.copies
    if copies is None:
        if asked is not None:
            raise DeviceError(
                "--vram bounds a device's own memory, and the CPU has none; leave it out, or add --device cuda"
            )
        return None
    free = copies.available()
    if asked is not None and asked > free:
        raise CapTooLargeError(
            f"a --vram cap of {format_size(asked)} cannot be kept: only {format_size(free)} of the device are free; "
            "lower the cap, or end what else uses the card",
            free,
        )
    return DeviceMemory(asked or int(free * SAFE_SHARE), copies.overhead)


def resolve_cap(manifest: Manifest, request: Request, *, asked: bool) -> Plan:
    """As `memory.resolve`; where nobody asked for the cap, the error says where it comes from."""
    if asked:
        return resolve(manifest, request)
    check_device_floor(manifest, request)
    try:
        return resolve(manifest, request)
    except CapTooSmallError as e:
        raise CapTooSmallError(
            f"this model needs at least {format_size(e.floor)} ({e.floor} bytes) and {machine.usable_reason()}, "
            f"of which {SAFE_SHARE:.0%} are taken when no cap is given; free memory, or raise the limit",
            e.floor,
        ) from None


def _context(facts: Facts, asked: int | None) -> int:
    if asked is None:
        return min(facts.context_length, DEFAULT_CONTEXT)
    if not 1 <= asked <= facts.context_length:
        why = "what this model was made for" if facts.window is None else "the attention window of this model"
        raise PromptError(f"a context of {asked} is not in 1..{facts.context_length}, {why}")
    return asked
