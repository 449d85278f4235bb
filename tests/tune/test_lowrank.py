"""Low-rank predictors begun in closed form: there is none better of that rank, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer.tune import lowrank
from flashinfer.tune.lowrank import GAIN, Factors, Floats, closed_form, closed_form_bytes, stored
from tests.tune.decisions import HIDDEN, blocks, layer, peak_of, slices


def scaled(rows: Floats, bias: Floats, inputs: Floats) -> tuple[np.ndarray, np.ndarray]:
    """What the closed form approximates: products in units of the deviation they would have if coordinates were
    independent, and those units."""
    scale = np.sqrt(np.square(rows.astype(np.float64)) @ inputs.astype(np.float64).var(0))
    return (inputs.astype(np.float64) @ rows.T.astype(np.float64) + bias) / scale, scale


def least_error(rows: Floats, bias: Floats, inputs: Floats, rank: int) -> float:
    """Of the best affine predictor of that rank, by a singular value decomposition of all the products."""
    products, _ = scaled(rows, bias, inputs)
    values = np.linalg.svd(products - products.mean(0), compute_uv=False)
    return float(np.square(values[rank:]).sum())


def error(factors: Factors, rows: Floats, bias: Floats, inputs: Floats) -> float:
    products, _ = scaled(rows, bias, inputs)
    return float(np.square(factors.score(inputs) / GAIN - products).sum())


@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_is_the_best_of_its_rank(rank: int, seed: int) -> None:
    rows, bias, inputs = layer(seed)
    factors = closed_form(blocks(rows), bias, blocks(inputs), rank, hidden=HIDDEN)
    assert factors.rank == rank
    assert error(factors, rows, bias, inputs) < 1.005 * least_error(rows, bias, inputs, rank)


def test_power_iterations_are_what_makes_it_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bias, inputs = layer(hidden=200, neurons=400)
    found = {}
    for turns in (0, lowrank.TURNS):
        monkeypatch.setattr(lowrank, "TURNS", turns)
        factors = closed_form(blocks(rows), bias, blocks(inputs), 16, hidden=200)
        found[turns] = error(factors, rows, bias, inputs) / least_error(rows, bias, inputs, 16)
    assert found[lowrank.TURNS] < 1.02
    assert found[0] > 1.05


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    rows, bias, inputs = layer(rank=12)
    factors = closed_form(blocks(rows), bias, blocks(inputs), 12, hidden=HIDDEN)
    products, scale = scaled(rows, bias, inputs)
    np.testing.assert_allclose(factors.score(inputs) / GAIN, products, atol=2e-4)
    clear = np.abs(products) > 1e-3
    assert ((factors.score(inputs) > 0) == (inputs @ rows.T + bias > 0))[clear].all()
    assert scale.min() > 0


@pytest.mark.parametrize("size", [1, 50, 5000])
def test_blocks_of_any_size_give_the_same_factors(size: int) -> None:
    rows, bias, inputs = layer()
    one, other = (closed_form(blocks(rows, s), bias, blocks(inputs, s), 8, hidden=HIDDEN) for s in (100, size))
    np.testing.assert_allclose(one.score(inputs), other.score(inputs), atol=1e-3)


def test_directions_of_the_factors_have_deviation_one() -> None:
    rows, bias, inputs = layer()
    factors = closed_form(blocks(rows), bias, blocks(inputs), 16, hidden=HIDDEN)
    np.testing.assert_allclose((inputs @ factors.a.T).std(axis=0), 1, rtol=0.01)


def test_rows_of_zeros_and_inputs_that_never_change() -> None:
    rows, bias, inputs = layer()
    rows[3], inputs[:, 5] = 0, 2
    factors = closed_form(blocks(rows), bias, blocks(inputs), 16, hidden=HIDDEN)
    assert np.isfinite(factors.score(inputs)).all()
    np.testing.assert_allclose(factors.score(inputs)[:, 3], GAIN * bias[3], atol=0.02)
    still = np.repeat(inputs[:1], 50, axis=0)
    products = still[:1] @ rows.T + bias
    found = closed_form(blocks(rows), bias, blocks(still), 16, hidden=HIDDEN).score(still[:1])
    assert (np.sign(found) == np.sign(products)).all()


def test_without_a_bias_and_without_inputs() -> None:
    rows, bias, inputs = layer()
    none, zero = (closed_form(blocks(rows), b, blocks(inputs), 8, hidden=HIDDEN) for b in (None, np.zeros_like(bias)))
    assert (none.bias == zero.bias).all()
    with pytest.raises(ValueError, match="no inputs"):
        closed_form(blocks(rows), bias, blocks(inputs[:0]), 8, hidden=HIDDEN)


@pytest.mark.parametrize(("codec", "share"), [("f32", 0), ("f16", 2**-11), ("int8g32", 1 / 254)])
def test_stored_factors_are_what_a_store_gives_back(codec: str, share: float) -> None:
    rows, bias, inputs = layer()
    factors = closed_form(blocks(rows), bias, blocks(inputs), 20, hidden=HIDDEN)
    back = stored(factors, codec)
    assert (back.bias == factors.bias).all()
    for before, after in ((factors.a, back.a), (factors.b, back.b)):
        assert after.shape == before.shape
        assert after.dtype == np.float32
        assert np.abs(after - before).max() <= 1.01 * share * np.abs(before).max()
        assert (np.abs(after - before).max() > 0) == (share > 0)


@pytest.mark.parametrize(
    ("hidden", "neurons", "rank", "size"), [(100, 1500, 64, 16), (400, 150, 32, 256), (400, 1500, 32, 256)]
)
def test_memory_is_bounded_by_the_estimate(hidden: int, neurons: int, rank: int, size: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((neurons, hidden), dtype=np.float32)
    inputs = rng.standard_normal((700, hidden), dtype=np.float32)
    bias = rows[:, 0].copy()

    def work() -> None:
        closed_form(slices(rows, size), bias, slices(inputs, size), rank, hidden=hidden)

    assert 0.3 < peak_of(work) / (closed_form_bytes(hidden, neurons, rank, size) + (64 << 10)) < 1
