"""The budget resolver: the parts sum to at most the cap, and the floor is the floor."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from flashinfer.backend.footprint import NATIVE, TORCH
from flashinfer.cache import WindowCache
from flashinfer.config import LOAD_CHUNK, Cap, IoConfig, RunConfig
from flashinfer.errors import CapTooSmallError
from flashinfer.memory import AdapterNeeds, DeviceMemory, Plan, Request, resolve
from flashinfer.speed import multiplied
from flashinfer.store import open_store

BASE = Request(context=64, threads=1, alignment=512, baseline=50_000_000, run=RunConfig(), cap=Cap(weight_memory=1))


def floor_of(manifest, request: Request) -> int:
    one_byte = Cap(memory=1) if request.cap.memory is not None else Cap(weight_memory=1)
    with pytest.raises(CapTooSmallError) as e:
        resolve(manifest, replace(request, cap=one_byte))
    return e.value.floor


def device_floor(manifest, request: Request) -> int:
    with pytest.raises(CapTooSmallError, match="--vram") as e:
        resolve(manifest, replace(request, device=DeviceMemory(1, overhead=10_000)))
    return e.value.floor


def check_device(plan: Plan, manifest) -> None:
    device = plan.device
    assert device is not None
    assert device.total <= device.cap
    assert (plan.kv_cache, plan.weight_vectors) == (0, 0)
    assert not device.resident & plan.resident
    assert sum(manifest.tensors[r].bytes for r in device.resident) <= device.weight_resident
    kept = list(zip(device.slots, plan.slots, manifest.layers, strict=True))
    assert all(near >= 0 and near + far <= layer.records for near, far, layer in kept)
    assert sum(near * layer.record_bytes for near, _, layer in kept) <= device.weight_slots
    assert device.half >= max(layer.record_bytes for layer in manifest.layers)
    assert device.weight_staging >= 2 * device.half >= 2 * max(64 * n.bundle_bytes for n in manifest.layers)


def check(plan: Plan, manifest) -> None:
    if plan.device is not None:
        check_device(plan, manifest)
    loading = 0 if plan.device is None else LOAD_CHUNK
    assert plan.total <= plan.cap
    assert plan.weight_staging == 2 * plan.neuron_staging + plan.ring + loading
    assert plan.ring == 0 or plan.ring >= 2 * plan.piece > 0
    matrices = {name for name in multiplied(manifest) if name not in plan.kept}
    assert plan.ring > 0 or not matrices
    assert all(0 <= s <= layer.records for s, layer in zip(plan.slots, manifest.layers, strict=True))
    assert (
        sum(s * layer.record_bytes for s, layer in zip(plan.slots, manifest.layers, strict=True)) <= plan.weight_slots
    )
    assert sum(manifest.tensors[r].bytes for r in plan.resident) <= plan.weight_resident


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    variant=st.sampled_from(["llama", "llama-silu", "opt", "llama-tied"]),
    kind=st.sampled_from(["memory", "weight_memory"]),
    above=st.integers(0, 600_000),
    alignment=st.sampled_from([512, 4096]),
    threads=st.integers(1, 4),
    objective=st.sampled_from(["time", "bytes"]),
    mode=st.sampled_from(["cached", "always-miss", "naive"]),
    ring=st.sampled_from([0, 100_000, 32 << 20]),
    staging=st.sampled_from([0, 100_000, 4 << 20]),
    footprint=st.sampled_from([NATIVE, TORCH]),
    kv_type=st.sampled_from(["f32", "f16", "int8"]),
    adapter=st.sampled_from([AdapterNeeds(), AdapterNeeds(30_000, 500, 96, 8)]),
    there=st.one_of(st.none(), st.integers(0, 600_000)),
)
def test_sums_to_at_most_the_cap(
    packed, variant, kind, above, alignment, threads, objective, mode, ring, staging, footprint, kv_type, adapter, there
) -> None:
    manifest = open_store(packed(variant).store).manifest
    run = RunConfig(io=IoConfig(objective=objective), ring=ring, staging=staging, kv_type=kv_type)
    request = replace(
        BASE, alignment=alignment, threads=threads, run=run, mode=mode, footprint=footprint, adapter=adapter,
        cap=Cap(**{kind: 1}),
    )  # fmt: skip
    if there is not None:
        least = device_floor(manifest, request)
        request = replace(request, device=DeviceMemory(least + there, overhead=10_000))
        with pytest.raises(CapTooSmallError, match=f"{least} bytes"):
            resolve(manifest, replace(request, device=DeviceMemory(least - 1, overhead=10_000)))
    floor = floor_of(manifest, request)
    check(resolve(manifest, replace(request, cap=Cap(**{kind: floor + above}))), manifest)
    with pytest.raises(CapTooSmallError, match=f"{floor} bytes"):
        resolve(manifest, replace(request, cap=Cap(**{kind: floor - 1})))


@pytest.mark.parametrize("kind", ["memory", "weight_memory"])
def test_an_adapter_raises_the_floor_by_what_it_takes(packed, kind: str) -> None:
    """Its bytes under either cap; under that of the process also what it adds to products, token by token."""
    manifest, request = open_store(packed("llama").store).manifest, replace(BASE, cap=Cap(**{kind: 1}))
    needs = AdapterNeeds(bytes=30_000, values=500, logits=96, rank=8)
    more = floor_of(manifest, replace(request, adapter=needs)) - floor_of(manifest, request)
    rows = 64 + 16  # the context, with the padding of a chunk
    assert more == 30_000 + (4 * (rows * 500 + 96) if kind == "memory" else 0)


def test_a_generous_cap_keeps_everything(packed) -> None:
    manifest = open_store(packed("llama").store).manifest
    plan = resolve(manifest, replace(BASE, cap=Cap(weight_memory=10**9)))
    assert plan.resident == {name for name, t in manifest.tensors.items() if len(t.shape) == 2}
    assert plan.slots == tuple(layer.records for layer in manifest.layers)
    assert plan.ring == 0


def test_a_device_takes_what_it_keeps_out_of_the_cap(packed) -> None:
    manifest = open_store(packed("llama").store).manifest
    request = replace(BASE, cap=Cap(weight_memory=10**9), device=DeviceMemory(10**9))
    alone, plan = resolve(manifest, replace(request, device=None)), resolve(manifest, request)
    assert plan.device is not None
    assert plan.device.resident == alone.resident
    assert not plan.resident
    assert plan.weight_total <= alone.weight_total - alone.weight_resident - alone.weight_vectors + LOAD_CHUNK


def test_the_memory_cap_counts_the_rest_too(packed) -> None:
    manifest = open_store(packed("llama").store).manifest
    weights = floor_of(manifest, replace(BASE, cap=Cap(weight_memory=1)))
    process = floor_of(manifest, replace(BASE, cap=Cap(memory=1)))
    assert process > weights + BASE.baseline


def test_a_long_context_is_named_as_the_reason(packed) -> None:
    manifest = open_store(packed("llama").store).manifest
    with pytest.raises(CapTooSmallError, match="--context"):
        resolve(manifest, replace(BASE, context=200_000, baseline=0, cap=Cap(memory=1)))


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_the_tables_of_a_large_model_are_counted(packed, density: float) -> None:
    """A slot table is small change for one layer, and more than the allowance for libraries for a hundred."""
    records, manifest = 20_000, open_store(packed("llama").store).manifest
    layer = structs.replace(manifest.layers[0], records=records, neurons=records)
    request = replace(BASE, cap=Cap(memory=10**9))
    plan = resolve(structs.replace(manifest, layers=(layer,)), request)
    random = np.random.default_rng(0)
    sets = [np.flatnonzero(random.random(records) <= density) for _ in range(request.run.cache.window)]
    tracemalloc.start()
    policy = WindowCache(records, records // 2, window=request.run.cache.window)
    policy.preload(np.arange(records // 2))
    for step in range(20):
        policy.step(sets[step % len(sets)].copy())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.3 * plan.bookkeeping < held <= plan.bookkeeping
