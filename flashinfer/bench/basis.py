"""What seconds are predicted from: the disk's curve and the machine's rates, measured here before, now, or assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashinfer import machine
from flashinfer.backend import Backend, device_name, has_native
from flashinfer.bench.curve import SECONDS, measure_curve
from flashinfer.bench.known import KnownDisk, load_known, remember
from flashinfer.bench.place import place_of
from flashinfer.bench.rates import BUFFER, ENOUGH, main_codec, measure_rates, rates_key
from flashinfer.config import DEVICE_RATES, Cap, DiskCurve, Rates, RunConfig
from flashinfer.request import threads_for
from flashinfer.store import Manifest, Store


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


def known_basis(store: Store, run: RunConfig, device: str = "cpu") -> Basis:
    """What was measured before, else the defaults, and labelled so. Measures nothing."""
    neurons = store.path_of(store.manifest.neurons)
    known = load_known()
    rates = known.rates.get(_rates_key(store.manifest, run, device))
    return _basis(known.disk(place_of(neurons), store.manifest.neurons.bytes), rates, device)


def _basis(disk: KnownDisk | None, rates: Rates | None, device: str = "cpu") -> Basis:
    return Basis(
        disk=disk.curve if disk else DiskCurve(),
        rates=rates or (Rates() if device == "cpu" else DEVICE_RATES),
        disk_source=f"measured {disk.when}" if disk else "default: not measured here",
        rates_source="measured" if rates else "default: not measured here",
        disk_measured=disk is not None,
    )


DEFAULT_BASIS = _basis(None, None)
"""What is assumed where nothing was measured."""


def _rates_key(m: Manifest, run: RunConfig, device: str) -> str:
    if device != "cpu":
        return rates_key(f"torch on {device_name(device)}", _codec(m), 1)
    native = run.backend == "native" or (run.backend == "auto" and has_native())
    return rates_key("native" if native else "torch", _codec(m), threads_for(m, run))


def _codec(m: Manifest) -> str:
    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2:
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    return main_codec(sizes)


def room_under(cap: Cap) -> int:
    """Bytes a measurement may take: half of what this process may still grow by, under that cap."""
    most = machine.usable_memory()
    if cap.memory is not None:
        most = min(most, cap.memory)
    return max(0, most - machine.resident_bytes()) // 2


def measured_basis(
    store: Store,
    backend: Backend,
    run: RunConfig,
    *,
    room: int,
    device: str = "cpu",
    remeasure: bool = False,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda _: None,
) -> Basis:
    """What is not known yet is measured, in about `seconds` for each chunk and depth of the disk and a second for the
    machine, within `room` bytes of memory, and remembered. `backend` is that of `device`.

    Raises:
        StoreError, StoreReadError: the neuron file cannot be read.
    """
    m = store.manifest
    disk = _measured_disk(store.path_of(m.neurons), remeasure, seconds, room, progress)
    key = _rates_key(m, run, device)
    rates = None if remeasure else load_known().rates.get(key)
    if rates is None:
        progress("measuring memory and arithmetic")
        buffer = max(1, min(BUFFER, room))
        rates = measure_rates(backend, _codec(m), hidden=m.facts.hidden_size, gated=m.facts.gated, buffer=buffer)
        if buffer >= ENOUGH:
            remember(rates=(key, rates))
    return _basis(disk, rates, device)


def _measured_disk(
    file: Path, remeasure: bool, seconds: float, room: int, progress: Callable[[str], None]
) -> KnownDisk | None:
    place = place_of(file)
    disk = None if remeasure else load_known().disk(place, file.stat().st_size)
    if disk is None:
        disk = measure_curve(file, seconds=seconds, room=room, progress=progress)
        if disk is not None:
            remember(disk=(place, disk))
    return disk
