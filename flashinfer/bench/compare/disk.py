"""What predictions rest on: the raw disk as it is now, its curve, and how fast this machine computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from flashinfer.backend import open_backend
from flashinfer.bench.basis import known_basis
from flashinfer.bench.curve import measure_curve
from flashinfer.bench.io import measure
from flashinfer.bench.io_figures import Combination
from flashinfer.bench.rates import main_codec, measure_rates
from flashinfer.config import BackendName, DiskCurve, Rates, RunConfig
from flashinfer.request import threads_for
from flashinfer.store import Manifest, Store
from flashinfer.units import MIB

IN_FLIGHT = 8
CURVE_SECONDS = 0.3
"""For each of ten combinations of chunk and depth."""


@dataclass(frozen=True)
class Disk:
    """The raw disk: a probe of its rate, and the curves that a rate (bytes/s) stands for."""

    probe: Callable[[], float]
    curves: Callable[[float], dict[str, dict[str, float]]]


def disk_of(store: Store, probe_seconds: float) -> tuple[Disk, dict[str, Any]]:
    """The disk under a store, and what is known of it as plain values. Measures the curve's shape once.

    The probe reads the neurons directly and in order, 1 MiB at a time where they are that large, eight in flight.
    """
    neurons = store.path_of(store.manifest.neurons)
    chunk = min(MIB, 1 << (neurons.stat().st_size // IN_FLIGHT).bit_length() - 1)
    basis, measured = known_basis(store, RunConfig()), measure_curve(neurons, seconds=CURVE_SECONDS)
    shape = measured.curve if measured else basis.disk
    known = basis.disk if basis.disk_measured else shape
    source = basis.disk_source if basis.disk_measured else "measured at the start of this run"

    def probe() -> float:
        result = measure(neurons, [Combination("sequential", chunk, IN_FLIGHT)], seconds=probe_seconds, rounds=1)
        return result.results[0].mb_per_s * 1e6

    def curves(rate: float) -> dict[str, dict[str, float]]:
        return {"probed": asdict(at_rate(shape, rate, chunk)), "cached": asdict(known)}

    return Disk(probe, curves), {"shape": asdict(shape), "known": asdict(known), "known_source": source}


def at_rate(shape: DiskCurve, rate: float, chunk: int) -> DiskCurve:
    """The curve with the same cost of a read that gives this rate for such chunks."""
    each = max(shape.per_read_s, shape.latency_s / IN_FLIGHT)
    return replace(shape, bytes_per_s=1 / max(1 / rate - each / chunk, 0.1 / rate))


def rates_of(m: Manifest, backend_name: BackendName) -> Rates:
    """How fast this machine computes with such weights on that backend, measured now."""
    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2:
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    backend = open_backend("cpu", threads_for(m, RunConfig()), backend_name)
    try:
        return measure_rates(backend, main_codec(sizes), hidden=m.facts.hidden_size, gated=m.facts.gated)
    finally:
        backend.close()


def roofline(flash_bytes: float, disk_rate: float, dram_bytes: float, dram_rate: float, seconds: float) -> float:
    """Share of a token's time that its bytes alone would take: read from flash at the probed rate, then through memory
    at the rate of a plain scan, one after the other (bytes, bytes/s, seconds)."""
    return (flash_bytes / disk_rate + dram_bytes / dram_rate) / seconds
