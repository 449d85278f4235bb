"""Training predictors: it follows the gradient of its loss, on either kind of arrays, and helps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.tune.fit import FAVOUR, NUMPY, Training, balance, gradients, loss, torch_arrays, train, train_bytes
from flashinfer.tune.frontier import Frontier
from flashinfer.tune.lowrank import Factors, Floats, closed_form
from flashinfer.tune.samples import Block
from tests.tune.decisions import HIDDEN, NEURONS, blocks, layer, peak_of


def batch(seed: int = 0, samples: int = 30) -> tuple[Factors, Block]:
    rng = np.random.default_rng(seed)
    a, b, bias = (rng.standard_normal(s).astype(np.float32) for s in ((6, HIDDEN), (NEURONS, 6), (NEURONS,)))
    x = rng.standard_normal((samples, HIDDEN)).astype(np.float32)
    return Factors(a / 4, b / 2, bias), Block(x, rng.random((samples, NEURONS)) < 0.1)


def weights(kind: str) -> float | Floats:
    return 7.0 if kind == "one" else np.random.default_rng(9).uniform(0.5, 9, NEURONS).astype(np.float32)


@pytest.mark.parametrize("kind", ["one", "each"])
def test_gradients_are_those_of_the_loss(kind: str) -> None:
    """Along random directions, in float64, by central differences."""
    factors, block = batch()
    weight = weights(kind)
    values = [v.astype(np.float64) for v in (factors.a, factors.b, factors.bias)]
    found = gradients(NUMPY, values, block.x.astype(np.float64), block.active.astype(np.float64), weight)
    rng = np.random.default_rng(1)
    for place, (value, gradient) in enumerate(zip(values, found, strict=True)):
        direction = rng.standard_normal(value.shape)
        step = 1e-5

        def moved(by: float, place: int = place, direction: np.ndarray = direction) -> float:
            at = [v + by * direction if i == place else v for i, v in enumerate(values)]
            return loss(Factors(*at), Block(block.x.astype(np.float64), block.active), weight)  # type: ignore[arg-type]

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("kind", ["one", "each"])
def test_gradients_are_those_of_torch(kind: str) -> None:
    factors, block = batch()
    weight = weights(kind)
    a, b, bias = (torch.tensor(v, requires_grad=True) for v in (factors.a, factors.b, factors.bias))
    scores, fired = torch.tensor(block.x) @ a.T @ b.T + bias, torch.tensor(block.active).float()
    heavy = torch.tensor(weight) if kind == "each" else weight
    each = heavy * fired * torch.nn.functional.softplus(-scores) + (1 - fired) * torch.nn.functional.softplus(scores)
    value = each.sum(1).mean()
    value.backward()  # type: ignore[no-untyped-call]
    assert loss(factors, block, weight) == pytest.approx(value.item(), rel=1e-5)
    found = gradients(NUMPY, [factors.a, factors.b, factors.bias], block.x, block.active.astype(np.float32), weight)
    for gradient, tensor in zip(found, (a, b, bias), strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_scores_beyond_all_measure_do_no_harm() -> None:
    factors, block = batch()
    far = Factors(factors.a * 1e4, factors.b, factors.bias)
    with np.errstate(over="raise", invalid="raise"):
        found = gradients(NUMPY, [far.a, far.b, far.bias], block.x, block.active.astype(np.float32), 9.0)
    assert all(np.isfinite(g).all() for g in found)


def planted(seed: int = 0, samples: int = 6000) -> tuple[Floats, Floats, Block]:
    """A layer of which an eighth fires. Half of its neurons, which look at half of the coordinates, hardly ever do, so
    that the closed form spends half of its rank in vain."""
    rows, _, _ = layer(seed)
    half = np.arange(HIDDEN) < HIDDEN // 2
    rows[: NEURONS // 2, half] = rows[NEURONS // 2 :, ~half] = 0
    inputs = np.random.default_rng(seed + 1).standard_normal((samples, HIDDEN)).astype(np.float32)
    inputs *= 0.93 ** (np.arange(HIDDEN, dtype=np.float32) % (HIDDEN // 2))
    products = inputs @ rows.T
    loud = np.quantile(products, 0.75, axis=0).astype(np.float32)
    bias = -np.where(np.arange(NEURONS) < NEURONS // 2, 4 * products.std(axis=0), loud)
    return rows, bias, Block(inputs, products + bias > 0)


def stream(block: Block, size: int, seed: int = 0) -> Iterator[Block]:
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(block.x), size)
        yield Block(block.x[rows], block.active[rows])


def over(factors: Factors, block: Block, recall: float = 0.95) -> float:
    frontier = Frontier()
    frontier.add(factors.score(block.x), block.active)
    return frontier.reaching(recall).over


def test_training_names_fewer_at_the_same_recall() -> None:
    rows, bias, block = planted()
    known, held_out = Block(block.x[:5000], block.active[:5000]), Block(block.x[5000:], block.active[5000:])
    start = closed_form(blocks(rows), bias, blocks(known.x), 16, hidden=HIDDEN)
    end = train(start, stream(known, 64), 300, weight=balance(0.125))
    assert over(end, held_out) < 0.75 * over(start, held_out)
    assert loss(end, held_out, balance(0.125)) < 0.5 * loss(start, held_out, balance(0.125))


def test_a_heavier_miss_names_more() -> None:
    rows, bias, block = planted()
    start = closed_form(blocks(rows), bias, blocks(block.x), 8, hidden=HIDDEN)
    light, heavy = (train(start, stream(block, 64), 150, weight=w) for w in (1.0, 20.0))
    assert (heavy.score(block.x) > 0).mean() > 1.5 * (light.score(block.x) > 0).mean()
    every_other = np.where(np.arange(NEURONS) % 2, 20, 1).astype(np.float32)
    mixed = train(start, stream(block, 64), 150, weight=every_other).score(block.x) > 0
    assert mixed[:, 1::2].mean() > 1.5 * mixed[:, ::2].mean()


def test_training_is_the_same_for_the_same_batches_and_leaves_its_start() -> None:
    rows, bias, block = planted()
    start = closed_form(blocks(rows), bias, blocks(block.x), 8, hidden=HIDDEN)
    kept = [v.copy() for v in (start.a, start.b, start.bias)]
    one, same, other = (train(start, stream(block, 32, seed), 20, weight=5.0) for seed in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(_values(one), _values(same), strict=True))
    assert not (one.b == other.b).all()
    assert all((x == y).all() for x, y in zip(kept, _values(start), strict=True))


def _values(factors: Factors) -> tuple[Floats, Floats, Floats]:
    return factors.a, factors.b, factors.bias


@pytest.mark.parametrize("kind", ["one", "each"])
def test_torch_trains_the_same_predictor(kind: str) -> None:
    rows, bias, block = planted()
    start = closed_form(blocks(rows), bias, blocks(block.x), 8, hidden=HIDDEN)
    plain, torched = (
        train(start, stream(block, 32), 25, weight=weights(kind), arrays=a) for a in (NUMPY, torch_arrays("cpu"))
    )
    for x, y in zip(_values(plain), _values(torched), strict=True):
        assert isinstance(y, np.ndarray)
        np.testing.assert_allclose(x, y, atol=2e-3)
    assert not (plain.b == start.b).all()


def test_progress_and_steps() -> None:
    _, block = batch()
    told: list[tuple[int, int]] = []
    factors, _ = batch()
    train(factors, itertools.repeat(block), 3, weight=1.0, progress=lambda *now: told.append(now))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert Training(batch=64, epochs=2).steps(320) == 10
    assert Training().steps(1) == 1


@given(st.floats(0, 1))
def test_whoever_fires_weighs_a_fixed_multiple_of_the_others(density: float) -> None:
    weight = balance(density)
    assert FAVOUR <= weight <= FAVOUR * 1e4
    if 1e-4 <= density <= 0.5:
        assert weight * density == pytest.approx(FAVOUR * (1 - density))


@pytest.mark.parametrize(
    ("hidden", "neurons", "rank", "size"), [(100, 1500, 64, 16), (400, 150, 32, 256), (400, 1500, 32, 256)]
)
def test_memory_is_bounded_by_the_estimate(hidden: int, neurons: int, rank: int, size: int) -> None:
    rng = np.random.default_rng(0)
    a, b, bias = (rng.standard_normal(s, dtype=np.float32) for s in ((rank, hidden), (neurons, rank), (neurons,)))

    def work() -> None:
        x = np.ones((size, hidden), dtype=np.float32)
        batches = (Block(x.copy(), rng.random((size, neurons), dtype=np.float32) < 0.1) for _ in range(3))
        train(Factors(a, b, bias), batches, 3, weight=np.full(neurons, 9, dtype=np.float32))

    assert 0.3 < peak_of(work) / (train_bytes(hidden, neurons, rank, size) + (64 << 10)) < 1
