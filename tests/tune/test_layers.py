"""Low-rank predictors of a whole model: kept layer by layer, within their bytes, measured on what they did not see."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.errors import PredictorError
from flashinfer.store import Store, open_store
from flashinfer.tune import layers as module
from flashinfer.tune.fit import NUMPY
from flashinfer.tune.layers import Fitted, Goal, bundled_bytes, fit_model, fitting_bytes, load_factors
from flashinfer.tune.lowrank import stored
from flashinfer.tune.rank import factor_bytes
from flashinfer.tune.samples import sample_type
from flashinfer.tune.work import Work
from tests.checkpoints import make_llama, make_opt
from tests.tune.fitting import inputs_of, products, write_samples

COUNT, FITTED = 320, 280
HIDDEN, NEURONS, LAYERS = 128, 160, 2
GOAL = Goal(over=1.05, recalls=(0.8, 0.95), memory=1 << 20)
"""So few are allowed in vain that higher ranks are worth a try."""


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    store: Store
    work: Work


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("layers") / "checkpoint", hidden_size=HIDDEN, intermediate_size=NEURONS, mlp_bias=True,
        num_hidden_layers=LAYERS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Store:
    pack(checkpoint, checkpoint.parent / "store")
    return open_store(checkpoint.parent / "store")


@pytest.fixture
def made(checkpoint: Path, store: Store, tmp_path: Path) -> Made:
    work = Work(tmp_path, "key")
    write_samples(store, checkpoint, work, COUNT)
    return Made(checkpoint, store, work)


def size(rank: int) -> int:
    return factor_bytes(HIDDEN, NEURONS, rank)


def test_what_they_do_by_brute_force(made: Made) -> None:
    """On the last eighth of the samples, with the factors as they come back from a store."""
    found = fit_model(made.store, made.work, GOAL)
    assert [f.layer for f in found] == list(range(LAYERS))
    for f in found:
        factors = load_factors(made.work, f)
        assert (factors.a.shape, factors.b.shape) == ((f.rank, HIDDEN), (NEURONS, f.rank))
        again = stored(factors, GOAL.codec)
        assert np.array_equal(again.a, factors.a)
        assert np.array_equal(again.b, factors.b)
        x = inputs_of(f.layer, COUNT, HIDDEN)
        fired = products(made.checkpoint, f.layer, x, "gate") > 0
        assert f.fired == pytest.approx(fired[:FITTED].mean())
        for recall in GOAL.recalls:
            o = f.at(GOAL, recall)
            named = x[FITTED:] @ factors.a.T @ factors.b.T + factors.bias > -o.shift
            assert o.recall >= recall
            assert (named & fired[FITTED:]).sum() / fired[FITTED:].sum() == pytest.approx(o.recall, abs=2e-3)
            assert named.mean() == pytest.approx(o.density, abs=2e-3)
            assert named.sum() / fired[FITTED:].sum() == pytest.approx(o.over, abs=5e-3)
            assert o.over < 1 / fired.mean()  # naming everyone would be easier


def test_what_is_kept_is_found_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fit_model(made.store, made.work, GOAL)
    factors = [load_factors(made.work, f) for f in found]
    monkeypatch.setattr(module, "_trained", lambda *_: pytest.fail("it was trained again"))
    told: list[tuple[int, int]] = []
    again = Work(made.work.path.parent, "key")
    other = fit_model(made.store, again, GOAL, progress=lambda *now: told.append(now))
    assert other == found
    assert all(isinstance(f, Fitted) and f == g for f, g in zip(other, found, strict=True))
    for f, before in zip(other, factors, strict=True):
        after = load_factors(again, f)
        assert all(np.array_equal(getattr(after, n), getattr(before, n)) for n in ("a", "b", "bias"))
    assert told == [(1, LAYERS), (2, LAYERS)]


def test_the_same_samples_give_the_same_factors(made: Made, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Work(tmp_path / "other", "key")
    write_samples(made.store, checkpoint, other, COUNT)
    one, two = fit_model(made.store, made.work, GOAL), fit_model(made.store, other, GOAL)
    assert one == two
    for f in one:
        a, b = load_factors(made.work, f), load_factors(other, f)
        assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("a", "b", "bias"))


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_the_budget_is_kept_and_used(made: Made, spare: int) -> None:
    """Room for the least ranks, and for one step up in so many layers."""
    step = size(64) - size(32)
    found = fit_model(made.store, made.work, replace(GOAL, budget=LAYERS * size(32) + spare * step))
    assert sum(size(f.rank) for f in found) <= LAYERS * size(32) + spare * step
    assert sorted(f.rank for f in found) == [32] * (LAYERS - spare) + [64] * spare


def test_an_easy_goal_takes_the_least_rank(made: Made) -> None:
    assert [f.rank for f in fit_model(made.store, made.work, replace(GOAL, over=100.0))] == [32] * LAYERS


def test_too_small_a_budget(made: Made) -> None:
    with pytest.raises(PredictorError, match=r"predictors of 2 layers do not fit .*; raise --budget"):
        fit_model(made.store, made.work, replace(GOAL, budget=LAYERS * size(32) - 1))


def test_ranks_for_which_there_is_no_memory(made: Made) -> None:
    """They are not tried, but for the least; and who is resumed with more memory goes on with the same ranks."""
    limit = fitting_bytes(HIDDEN, NEURONS, 64, GOAL)
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size < limit

    few = fit_model(made.store, made.work, GOAL, fits=fits)
    assert asked == [limit]
    assert [f.rank for f in few] == [32] * LAYERS
    assert fit_model(made.store, Work(made.work.path.parent, "key"), GOAL) == few


def test_a_bundle_with_its_decision_row(tmp_path: Path) -> None:
    for name, checkpoint in (
        ("llama", make_llama(tmp_path / "llama", dtype="bfloat16")),
        ("biased", make_llama(tmp_path / "biased", mlp_bias=True)),
        ("opt", make_opt(tmp_path / "opt", dtype="float16")),
    ):
        sizes = []
        for decision in ("separate", "bundled"):
            pack(checkpoint, tmp_path / f"{name}-{decision}", decision=decision)
            m = open_store(tmp_path / f"{name}-{decision}").manifest
            sizes.append([bundled_bytes(m, layer) for layer in range(3)])
        assert sizes[0] == sizes[1] == [layer.bundle_bytes for layer in m.layers]


def test_memory_is_less_than_was_said_and_not_much(tmp_path: Path) -> None:
    checkpoint = make_llama(
        tmp_path / "checkpoint", hidden_size=384, intermediate_size=768, num_hidden_layers=1, dtype="float16"
    )
    pack(checkpoint, tmp_path / "store")
    store, work = open_store(tmp_path / "store"), Work(tmp_path, "key")
    write_samples(store, checkpoint, work, 200)
    goal = replace(GOAL, memory=328 * sample_type(384, 768).itemsize)
    peaks = []
    for rank in (32, 192):
        tracemalloc.start()
        module._fit(store, work, goal, 0, rank, NUMPY)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        said = fitting_bytes(384, 768, rank, goal)
        assert peaks[-1] < said < 2.5 * peaks[-1] + module.DECISION_BLOCKS
    assert peaks[1] > 1.1 * peaks[0]
