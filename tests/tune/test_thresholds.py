"""Thresholds of a whole model, against plain arithmetic on the checkpoint's weights."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.backend import open_backend
from flashinfer.errors import StoreError
from flashinfer.store import Store, StoreUpdate, open_store
from flashinfer.tune import thresholds as module
from flashinfer.tune.levels import with_recall
from flashinfer.tune.sketch import write_predictors
from flashinfer.tune.threshold import LARGEST
from flashinfer.tune.thresholds import BASE, LOOKED_AT, Thresholds, activated, fit_thresholds, thresholding_bytes
from flashinfer.tune.trial import untried
from flashinfer.tune.work import Work
from tests.checkpoints import make_llama
from tests.tune.calibrating import OPTIONS
from tests.tune.fitting import inputs_of, products, weights_of, write_samples

COUNT, FITTED = 160, 140
HIDDEN, NEURONS, LAYERS = 48, 300, 2
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


def make(folder: Path, activation: str = "silu", **packing) -> tuple[Path, Store]:
    checkpoint = make_llama(
        folder / "checkpoint", intermediate_size=NEURONS, num_hidden_layers=LAYERS, hidden_act=activation,
        mlp_bias=True,
    )  # fmt: skip
    pack(checkpoint, folder / "store", **packing)
    return checkpoint, open_store(folder / "store")


def fitted(folder: Path, checkpoint: Path, store: Store) -> Thresholds:
    folder.mkdir(exist_ok=True)
    work = Work(folder, "key")
    write_samples(store, checkpoint, work, COUNT, sparse=False)
    return fit_thresholds(store, work, threads=1)


def parts(checkpoint: Path, layer: int, x: np.ndarray, activation: str) -> tuple[np.ndarray, ...]:
    """|act(g)|, |u| and |down|, by hand."""
    gate = torch.from_numpy(products(checkpoint, layer, x, "gate"))
    act = np.abs(ACTIVATIONS[activation](gate).numpy())
    up = np.abs(products(checkpoint, layer, x, "up"))
    return act, up, np.linalg.norm(weights_of(checkpoint, layer)["down.weight"], axis=0)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_thresholds_by_brute_force(tmp_path: Path, activation: str) -> None:
    checkpoint, store = make(tmp_path, activation)
    found = fitted(tmp_path / "work", checkpoint, store)
    tensors = found.tensors()
    assert [t.role for t in tensors] == [f"layers.{i}.ffn.threshold" for i in range(LAYERS)]
    assert found.factors(BASE) == (1.0,) * LAYERS
    for layer, tensor in enumerate(tensors):
        [data] = tensor.chunks()
        t = np.frombuffer(data, np.float32)
        act, up, down = parts(checkpoint, layer, inputs_of(layer, COUNT, HIDDEN)[:FITTED], activation)
        weight = np.sqrt(np.square(up).mean(axis=0)) * down
        scores = act * weight
        tau = np.quantile(scores, 1 - BASE)
        assert t == pytest.approx(tau / weight, rel=2e-3)
        for density in (0.9, 0.6, 0.5, 0.25, 0.05):
            kept = act > t * np.float32(found.factors(density)[layer])
            assert kept.mean() == pytest.approx(density, abs=2e-3)
            lowest, highest = scores[kept].min(), scores[~kept].max()
            assert highest <= lowest * 1.01  # those that are kept add most, to the width of a bin
    assert found.factors(1.0) == (0.0,) * LAYERS
    factors = [found.factors(d) for d in (0.9, 0.5, 0.1)]
    assert all(a < b < c for a, b, c in zip(*factors, strict=True))


def test_it_does_not_matter_where_the_weights_lie(tmp_path: Path) -> None:
    checkpoint, store = make(tmp_path)
    order = [np.random.default_rng(i).permutation(NEURONS) for i in range(LAYERS)]
    pack(checkpoint, tmp_path / "bundled", decision="bundled", permutation=order, bundles_per_record=3)
    one = fitted(tmp_path / "one", checkpoint, store)
    two = fitted(tmp_path / "two", checkpoint, open_store(tmp_path / "bundled"))
    for layer in range(LAYERS):
        a, b = (found.work.kept(f"layer-{layer}.thresholds") for found in (one, two))
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_what_is_kept_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, store = make(tmp_path)
    found = fitted(tmp_path / "work", checkpoint, store)
    monkeypatch.setattr(module, "score_layer", lambda *_: pytest.fail("it was looked at again"))
    told: list[tuple[int, int]] = []
    again = fit_thresholds(store, Work(tmp_path / "work", "key"), threads=1, progress=lambda *now: told.append(now))
    assert again.factors(0.3) == found.factors(0.3)
    assert told == [(1, LAYERS), (2, LAYERS)]


def test_scores_of_one_layer_at_a_time(tmp_path: Path) -> None:
    """They take 8 MiB a layer, and there may be a hundred layers."""
    work = Work(tmp_path, "key")
    bins = np.zeros(1 << 19, dtype=np.int64)
    bins[1000:2000] = 1
    for layer in range(5):
        work.keep(f"layer-{layer}.thresholds", weights=np.ones(4, np.float32), counts=bins)
    found = Thresholds(work, 5)
    tracemalloc.start()
    assert found.factors(0.5) == (1.0,) * 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (8 << 20)


def test_a_layer_that_adds_nothing(tmp_path: Path) -> None:
    """Whose thresholds no factor can scale."""
    work = Work(tmp_path, "key")
    bins = np.zeros(1 << 19, dtype=np.int64)
    bins[0] = 100
    work.keep(
        "layer-0.thresholds", weights=np.zeros(4, np.float32), counts=bins
    )  # fmt: skip
    found = Thresholds(work, 1)
    assert np.isfinite(found.factors(0.3)).all()
    [tensor] = found.tensors()
    values = np.frombuffer(next(iter(tensor.chunks())), np.float32)
    assert (values == LARGEST).all()


def test_scores_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="calibrate again"):
        Thresholds(Work(tmp_path, "key"), 1).factors(0.5)


def test_the_share_that_is_kept_by_brute_force(tmp_path: Path) -> None:
    """On the samples that thresholds were not fitted to."""
    checkpoint, store = make(tmp_path)
    found = fitted(tmp_path / "work", checkpoint, store)
    with StoreUpdate(store) as update:
        file, entries = write_predictors(update, found.tensors())
        update.commit(
            msgspec.structs.replace(store.manifest, predictors=file, tensors=store.manifest.tensors | entries)
        )
    store = open_store(store.root)
    levels = [untried("threshold", d, found.factors(d), 1.0, d) for d in (0.6, 0.2)]
    kept = with_recall(store, found.work, levels, "auto")
    for level, before in zip(kept, levels, strict=True):
        shares = []
        for layer in range(LAYERS):
            act, up, down = parts(checkpoint, layer, inputs_of(layer, COUNT, HIDDEN)[FITTED:], "silu")
            t = store.read_tensor(f"layers.{layer}.ffn.threshold") * np.float32(level.adjust[layer])
            size = act * up * down
            shares.append(size[act > t].sum() / size.sum())
        assert level.recall == pytest.approx(np.mean(shares), rel=1e-4)
        assert (level.target, level.adjust) == (before.target, before.adjust)
    assert 0.2 < kept[1].recall < kept[0].recall < 1.0


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("neurons", [5, 64, 130])
def test_activations_are_those_of_the_model(activation: str, neurons: int) -> None:
    x = np.random.default_rng(0).standard_normal((7, neurons)).astype(np.float32) * 3
    backend = open_backend("cpu", 1)
    try:
        found = activated(backend, activation, x)  # type: ignore[arg-type]
    finally:
        backend.close()
    assert found.shape == x.shape
    assert found == pytest.approx(ACTIVATIONS[activation](torch.from_numpy(x)).numpy(), abs=1e-6)


@pytest.mark.parametrize("samples", [160, 4 * LOOKED_AT])
def test_memory_is_less_than_was_said_and_not_much(tmp_path: Path, samples: int) -> None:
    checkpoint = make_llama(
        tmp_path / "checkpoint", hidden_size=256, intermediate_size=600, num_hidden_layers=1, hidden_act="silu"
    )
    pack(checkpoint, tmp_path / "store")
    store, work = open_store(tmp_path / "store"), Work(tmp_path, "key")
    write_samples(store, checkpoint, work, samples, sparse=False)
    tracemalloc.start()
    fit_thresholds(store, work, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < thresholding_bytes(256, samples) < 4 * peak
    assert OPTIONS.tokens < LOOKED_AT
