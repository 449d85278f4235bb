"""Predictions: bytes as the ledger counts them, and more memory is never predicted slower."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.backend.footprint import NATIVE, TORCH, Footprint
from flashinfer.config import Cap, DiskCurve, IoConfig, KvType, Rates, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.firing import Firing, firing_of
from flashinfer.memory import AdapterNeeds, DeviceMemory, Mode, Plan, Request, resolve
from flashinfer.speed import Conditions, predict
from flashinfer.store import Facts, FileEntry, Manifest, NeuronLayer, PartEntry, TensorEntry, open_store
from tests.checkpoints import make_llama

PROMPT = [5, 9, 33, 71, 8, 15, 60, 42]
TOKENS = [random.Random(1).randrange(3, 90) for _ in range(30)]
BASE = Request(context=64, threads=2, alignment=512, baseline=60_000_000, run=RunConfig(), cap=Cap(weight_memory=1))


def conditions(manifest: Manifest, request: Request, firing: Firing | None = None) -> Conditions:
    run = request.run
    layers = firing_of(manifest, request.choice) if firing is None else (firing,) * len(manifest.layers)
    return Conditions(manifest, run, request.alignment, request.mode, run.io.disk, run.rates, layers, request.choice)


def floor_of(manifest: Manifest, request: Request) -> int:
    one_byte = Cap(memory=1) if request.cap.memory is not None else Cap(weight_memory=1)
    with pytest.raises(CapTooSmallError) as e:
        resolve(manifest, replace(request, cap=one_byte))
    return e.value.floor


# -- bytes, against the ledger


def run_and_predict(store: Path, cap: int, run: RunConfig, mode: Mode) -> tuple[float, float, Plan]:
    """Bytes per token as counted, and as predicted from the density and the hit rate of that very run."""
    with Model.open(store, Cap(weight_memory=cap), context=128, run=run, mode=mode) as model:
        session = model.session()
        model.step(session, PROMPT)
        for token in TOKENS:
            model.step(session, [token])
        account, m = model.ledger.decode, model.store.manifest
        touched = (account.hits + account.misses) / len(TOKENS) / sum(n.records for n in m.layers)
        density = 1.0 - (1.0 - touched) ** (1 / m.layers[0].bundles_per_record)
        firing = Firing(density, hit_rate=account.hit_rate, source="measured") if m.facts.sparse else None
        request = replace(BASE, run=run, mode=mode, alignment=model._reader.alignment)
        found = predict(conditions(m, request, firing), model.plan, prompt_tokens=len(PROMPT))
        return account.bytes_per_token, found.flash_bytes, model.plan


SIZES = {"hidden_size": 64, "intermediate_size": 1024, "vocab_size": 600, "max_position_embeddings": 128}


def sparser(checkpoint: Path, shift: float) -> Path:
    """Lower the bias of the gate, so that fewer neurons fire."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("gate_proj.bias"):
            tensors[name] = torch.full_like(tensors[name], shift)
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense and sparse models of a few MB; `wide` has records of 8 KiB, as models of a few billion parameters do."""
    root = tmp_path_factory.mktemp("speed")
    out = {name: root / name for name in ("silu", "silu-odd-records", "relu", "relu-records-of-three", "wide")}
    dense = make_llama(root / "dense", **SIZES, hidden_act="silu")
    sparse = sparser(make_llama(root / "sparse", **SIZES, hidden_act="relu", mlp_bias=True), -1.2)
    shape = SIZES | {"hidden_size": 1024, "head_dim": 16, "intermediate_size": 512, "num_hidden_layers": 2}
    wide = sparser(make_llama(root / "wide-checkpoint", **shape, hidden_act="relu", mlp_bias=True), -1.2)
    pack(wide, out["wide"])
    pack(dense, out["silu"])
    pack(dense, out["silu-odd-records"], bundles_per_record=3)
    pack(sparse, out["relu"], bundles_per_record=1)
    pack(sparse, out["relu-records-of-three"], bundles_per_record=3)
    return out


def check_bytes(store: Path, share: float, run: RunConfig, mode: Mode = "cached") -> None:
    """At a cap that share of the way from the floor to the whole model."""
    manifest = open_store(store).manifest
    footprint = NATIVE if has_native() else TORCH
    how = {"threads": 1, "run": run, "alignment": 4096, "mode": mode, "context": 128, "footprint": footprint}
    floor = floor_of(manifest, replace(BASE, **how))
    cap = floor + int(share * manifest.weight_bytes())
    counted, predicted, plan = run_and_predict(store, cap, run, mode)
    assert predicted == pytest.approx(counted, rel=0.05), plan


SHARES = [0.0, 0.15, 0.4, 0.6, 1.1]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["silu", "silu-odd-records"])
def test_bytes_of_a_dense_model(stores, name: str, share: float) -> None:
    check_bytes(stores[name], share, RunConfig(threads=1))


@pytest.mark.parametrize("mode", ["always-miss", "naive"])
@pytest.mark.parametrize("name", ["silu", "wide"])
def test_bytes_without_a_cache(stores, name: str, mode: Mode) -> None:
    check_bytes(stores[name], 0.3, RunConfig(threads=1), mode)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["relu", "relu-records-of-three", "wide"])
def test_bytes_of_a_sparse_model_given_what_fires(stores, name: str, share: float) -> None:
    check_bytes(stores[name], share, RunConfig(threads=1, io=IoConfig(objective="bytes")))


@pytest.mark.parametrize("share", SHARES)
def test_bytes_where_holes_are_read_through(stores, share: float) -> None:
    check_bytes(stores["wide"], share, RunConfig(threads=1))


# -- more memory is never slower


@cache
def synthetic(
    activation: str, hidden: int, neurons: int, layers: int, per_record: int = 1, tied: bool = False
) -> Manifest:
    """The manifest of a gated llama at f16, as pack would write it; its files do not exist."""
    heads = hidden // 64
    facts = Facts("llama", 32000, hidden, hidden, neurons, layers, heads, heads // 4 or 1, 64, 4096, "rms", 1e-5, "pre",
                  activation, True, tied)  # fmt: skip
    kv = facts.num_kv_heads * facts.head_dim
    shapes = {"embed.weight": (32000, hidden)}
    for i in range(layers):
        shapes |= {f"layers.{i}.attn.{p}.weight": (hidden if p in "qo" else kv, hidden) for p in "qkvo"}
        shapes[f"layers.{i}.ffn.gate.weight"] = (neurons, hidden)
    shapes |= {} if tied else {"head.weight": (32000, hidden)}
    tensors, end = {}, 4096
    for name, shape in shapes.items():
        tensors[name] = TensorEntry("f16", shape, end, 2 * shape[0] * shape[1], "", name)
        end += -(-tensors[name].bytes // 4096) * 4096
    parts = (PartEntry("up.weight", "f16", hidden, 0, ""), PartEntry("down.weight", "f16", hidden, 2 * hidden, ""))
    record, records = -(-per_record * 4 * hidden // 512) * 512, -(-neurons // per_record)
    size = record * records
    places = tuple(
        NeuronLayer(neurons, "separate", parts, 4 * hidden, per_record, record, records, i * size, size, "")
        for i in range(layers)
    )
    files = FileEntry("dense", end, ""), FileEntry("neurons", layers * size, "")
    return Manifest("flashinfer-store", 1, "test", 512, facts, *files, tensors, places, {})


MANIFESTS = {
    "tiny": lambda: synthetic("relu", 64, 300, 2),
    "tiny-dense": lambda: synthetic("silu", 64, 300, 3, 5, True),
    "small": lambda: synthetic("relu", 512, 2048, 6, 3, True),
    "3b-relu": lambda: synthetic("relu", 3200, 8640, 26),
    "3b-silu": lambda: synthetic("silu", 3200, 8640, 26),
    "7b-relu": lambda: synthetic("relu", 4096, 11008, 32),
}
CURVES = [DiskCurve(), DiskCurve(5e-6, 7e9, 80e-6), DiskCurve(100e-6, 2e8, 1e-3), DiskCurve(0.0, 1e9, 0.0)]
RATES = [Rates(), Rates(linear=1.5e9, bundle=1e9), Rates(linear=80e9, bundle=60e9)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MANIFESTS)),
    kind=st.sampled_from(["memory", "weight_memory"]),
    curve=st.sampled_from(CURVES),
    rates=st.sampled_from(RATES),
    mode=st.sampled_from(["cached", "always-miss"]),
    alignment=st.sampled_from([512, 4096]),
    share=st.floats(0.0, 1.2),
    more=st.one_of(st.integers(0, 20_000), st.floats(0.0, 0.3)),
    ring=st.sampled_from([0, 1 << 20, RunConfig().ring, 512 << 20]),
    footprint=st.sampled_from([NATIVE, TORCH]),
    kv_type=st.sampled_from(["f32", "f16", "int8"]),
    adapter=st.sampled_from([AdapterNeeds(), AdapterNeeds(40 << 20, 11_008, 32_000, 16)]),
    there=st.one_of(st.none(), st.tuples(st.floats(0.0, 1.2), st.floats(0.0, 0.3))),
)
def test_more_memory_is_never_predicted_slower(
    name: str, kind: str, curve: DiskCurve, rates: Rates, mode: Mode, alignment: int, share: float, more: int | float,
    ring: int, footprint: Footprint, kv_type: KvType, adapter: AdapterNeeds, there: tuple[float, float] | None,
) -> None:  # fmt: skip
    """Nor is more memory of a device, where there is one; both at once grow here."""
    manifest = MANIFESTS[name]()
    run = RunConfig(io=IoConfig(disk=curve), rates=rates, ring=ring, kv_type=kv_type)
    request = replace(
        BASE, run=run, mode=mode, alignment=alignment, context=256, footprint=footprint, adapter=adapter,
        cap=Cap(**{kind: 1}),
    )  # fmt: skip
    devices: list[DeviceMemory | None] = [None, None]
    if there is not None:
        with pytest.raises(CapTooSmallError) as e:
            resolve(manifest, replace(request, device=DeviceMemory(1)))
        first = e.value.floor + int(there[0] * manifest.weight_bytes())
        devices = [DeviceMemory(first), DeviceMemory(first + int(there[1] * manifest.weight_bytes()))]
    request = replace(request, device=devices[0])
    cap = floor_of(manifest, request) + int(share * manifest.weight_bytes())
    caps = [cap, cap + (more if isinstance(more, int) else int(more * manifest.weight_bytes()))]
    plans = [
        resolve(manifest, replace(request, cap=Cap(**{kind: c}), device=device))
        for c, device in zip(caps, devices, strict=True)
    ]
    less, same = (predict(conditions(manifest, request), p, prompt_tokens=128).token_seconds for p in plans)
    assert same <= less * (1 + 1e-9)
