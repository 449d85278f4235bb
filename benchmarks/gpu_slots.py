"""Who is needed and which slots change, decided where arithmetic is, against the same on the host.

    python benchmarks/gpu_slots.py [--device cpu] [--records 16384] [--near 0.25] [--far 0.25] [--active 0.05]
                                   [--layers 32] [--tokens 60]

Each token's active records are drawn anew, the popular ones more often (Zipf), and their flags lie where arithmetic is
before the clock starts. *device*: `DeviceTieredCache.choose`, of which rows come to the host; on a card it is a CUDA
graph from the second token of a layer on. *host*: the flags come to the host, their numbers are found, and the policy
in C++ (numpy where it is not built) takes a step. Both decide the same, which is looked at first. Layer by layer, in
turn, in an order that changes with the token. Given are the medians (range) over tokens and layers, after ten tokens.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import astuple
from statistics import median
from typing import Any

import numpy as np

from flashinfer.backend import APART, open_backend
from flashinfer.cache import Change, DeviceTieredCache, Policy, device_cache, tiered_cache

WARM = 10
"""Tokens that are not counted: slots fill, graphs are recorded."""


class Layers:
    """Caches of some layers, on the device and on the host, of the same sizes."""

    def __init__(self, backend: Any, layers: int, records: int, near: int, far: int) -> None:
        self.backend, one = backend, np.arange(records)
        knobs: Any = {"window": 5, "retention": "frequency"}
        self.device: list[DeviceTieredCache] = []
        for _ in range(layers):
            there = device_cache(backend, records, near, far, **knobs, record_of=one, within=np.zeros_like(one))
            assert there is not None
            self.device.append(there)
        self.host: list[Policy] = [tiered_cache(records, near, far, **knobs) for _ in range(layers)]

    def on_device(self, layer: int, flags: Any) -> Change:
        """A step of that layer's cache on the device."""
        return self.device[layer].choose(flags).change

    def on_host(self, layer: int, flags: Any) -> Change:
        """A step of that layer's cache on the host."""
        return self.host[layer].step(np.flatnonzero(self.backend.marks(flags)[0]))


def run(layers: Layers, records: int, active: float, tokens: int) -> dict[str, list[float]]:
    """Seconds of each step. Raises SystemExit where the two decide differently."""
    rng, count = np.random.default_rng(0), len(layers.device)
    popularity = 1 / np.sqrt(np.arange(1, records + 1))
    share = np.minimum(1, popularity * active * records / popularity.sum())
    orders = [rng.permutation(records) for _ in range(count)]
    steps: dict[str, Callable[[int, Any], Change]] = {"device": layers.on_device, "host": layers.on_host}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for token in range(tokens):
        names = list(steps) if token % 2 else list(steps)[::-1]
        for layer in range(count):
            flags = layers.backend.flags((rng.random(records) < share)[orders[layer]][None])
            found = {}
            for name in names:
                layers.backend.fetch(flags)  # what was asked for before has ended
                began = time.perf_counter()
                found[name] = steps[name](layer, flags)
                if token >= WARM:
                    seconds[name].append(time.perf_counter() - began)
            pairs = zip(astuple(found["device"]), astuple(found["host"]), strict=True)
            if not all(np.array_equal(a, b) for a, b in pairs):
                raise SystemExit(f"error: token {token}, layer {layer}: device and host decide differently")
    return seconds


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default=APART, help="cuda, cuda:N, or the CPU (the default)")
    p.add_argument("--records", type=int, default=16384)
    p.add_argument("--near", type=float, default=0.25, help="share of the records in slots of the device")
    p.add_argument("--far", type=float, default=0.25, help="share in slots of the host")
    p.add_argument("--active", type=float, default=0.05, help="share that a token needs")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--tokens", type=int, default=60)
    a = p.parse_args(argv)
    if a.tokens <= WARM:
        raise SystemExit(f"error: {a.tokens} tokens, of which the first {WARM} are not counted; take more")
    backend = open_backend(a.device, 1, "torch")
    layers = Layers(backend, a.layers, a.records, round(a.records * a.near), round(a.records * a.far))
    seconds = run(layers, a.records, a.active, a.tokens)
    backend.close()
    device = "the CPU, as a device" if a.device == APART else a.device
    print(
        f"{device}; {a.layers} layers of {a.records} records, {a.near:.0%} in near slots, {a.far:.0%} in far ones, "
        f"{a.active:.0%} needed, {a.tokens - WARM} tokens; load {os.getloadavg()[0]:.2f}"
    )
    for name, some in seconds.items():
        each = [1e3 * s for s in some]
        whole = median(each) * a.layers
        print(f"{name:>6}: {median(each):.3f} ms a step ({min(each):.3f}-{max(each):.3f}), {whole:.1f} ms a token")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
