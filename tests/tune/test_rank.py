"""Ranks: the smallest that does is found, and together they fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.quant import codec_named
from flashinfer.tune.rank import LADDER, Need, allocate, estimate, factor_bytes, ladder, next_rank, smallest


@pytest.mark.parametrize("codec", ["f32", "f16", "int8g32"])
@pytest.mark.parametrize(("hidden", "neurons", "rank"), [(192, 1536, 64), (100, 70, 32)])
def test_bytes_are_those_of_the_encoded_factors(codec: str, hidden: int, neurons: int, rank: int) -> None:
    encode = codec_named(codec).encode
    a, b = np.ones((rank, hidden), np.float32), np.ones((neurons, rank), np.float32)
    assert factor_bytes(hidden, neurons, rank, codec) == encode(a).nbytes + encode(b).nbytes + 4 * neurons


def test_the_ladder_ends_where_the_matrix_is_the_better_predictor() -> None:
    assert ladder(192, 1536, 1 << 30) == (32, 64, 96)
    assert ladder(40, 1536, 1 << 30) == (32,)
    assert ladder(31, 1536, 1 << 30) == ()
    assert ladder(2000, 8640, 1 << 40) == LADDER[:-1]
    assert ladder(3200, 8640, 1 << 40) == LADDER
    assert ladder(192, 1536, factor_bytes(192, 1536, 64)) == (32, 64)
    assert ladder(192, 1536, factor_bytes(192, 1536, 32) - 1) == ()


def search(over: dict[int, float], asked: float, start: int) -> tuple[int, list[int]]:
    """What is found, and what was measured for it."""
    ranks, known, order = sorted(over), {}, []
    while (rank := next_rank(ranks, known, asked, start)) is not None:
        assert rank not in known
        known[rank] = over[rank]
        order.append(rank)
    return smallest(ranks, known, asked), order


@given(st.lists(st.floats(1, 12), min_size=1, max_size=10), st.floats(1, 12), st.integers(0, 9))
def test_the_smallest_rank_that_does_is_found_from_any_start(found: list[float], asked: float, start: int) -> None:
    ranks = LADDER[: len(found)]
    over = dict(zip(ranks, sorted(found, reverse=True), strict=True))
    chosen, measured = search(over, asked, ranks[start % len(ranks)])
    good = [r for r in ranks if over[r] <= asked]
    assert over[chosen] == over[good[0] if good else ranks[-1]]
    if good and good[0] != ranks[0]:
        assert ranks[ranks.index(good[0]) - 1] in measured


def test_a_good_start_takes_two_measurements() -> None:
    over = {32: 5.0, 64: 3.5, 96: 2.9, 128: 2.5, 192: 2.0}
    assert search(over, 3.0, 96) == (96, [96, 64])
    assert search(over, 3.0, 64) == (96, [64, 96])
    assert search(over, 3.0, 192) == (96, [192, 128, 96, 64])
    assert search(over, 1.5, 128) == (192, [128, 192])


def test_between_and_beyond_what_was_measured_is_estimated() -> None:
    over = {32: 4.0, 128: 2.0}
    assert estimate(over, 32) == 4.0
    assert estimate(over, 64) == pytest.approx(8**0.5)
    assert estimate(over, 512) == pytest.approx(1.0)
    assert estimate(over, 1024) == 1.0
    assert estimate({64: 3.0}, 256) == pytest.approx(1.5)
    assert estimate({32: 2.0, 64: 2.5}, 128) == 2.5  # noise does not make more rank look worse


def need(wanted: int, over: dict[int, float], fired: float = 1.0, ranks: tuple[int, ...] = (32, 64, 96)) -> Need:
    return Need(ranks, wanted, over, fired, {r: factor_bytes(192, 1536, r) for r in ranks})


DEMO = [  # measured on the embedded model: layers by rank, and the share of neurons that fires
    need(64, {32: 3.23, 64: 2.02}, 0.083),
    need(64, {32: 3.66, 64: 2.12}, 0.063),
    need(64, {32: 3.93, 64: 2.41}, 0.079),
    need(64, {32: 4.12, 64: 2.59}, 0.081),
    need(64, {32: 3.82, 64: 2.51}, 0.085),
]


def test_bytes_go_where_they_save_most_reading() -> None:
    assert allocate(DEMO, 5 * factor_bytes(192, 1536, 64)) == (64,) * 5
    assert allocate(DEMO, 531_300) == (32, 32, 64, 64, 64)
    assert allocate(DEMO, 5 * factor_bytes(192, 1536, 32)) == (32,) * 5


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="least rank"):
        allocate(DEMO, 5 * factor_bytes(192, 1536, 32) - 1)


@settings(max_examples=60)
@given(st.data())
def test_ranks_fit_together_and_nobody_gets_more_than_wanted(data: st.DataObject) -> None:
    ranks = LADDER[: data.draw(st.integers(1, 6))]
    layers = []
    for _ in range(data.draw(st.integers(1, 8))):
        curve = sorted(data.draw(st.lists(st.floats(1, 10), min_size=len(ranks), max_size=len(ranks))), reverse=True)
        known = data.draw(st.sets(st.sampled_from(ranks), min_size=1))
        over = {r: o for r, o in zip(ranks, curve, strict=True) if r in known}
        layers.append(need(data.draw(st.sampled_from(sorted(known))), over, data.draw(st.floats(0.01, 1)), ranks))
    size = layers[0].size
    least, most = len(layers) * size[ranks[0]], sum(size[layer.wanted] for layer in layers)
    budget = data.draw(st.integers(least, most + 1000))
    chosen = allocate(layers, budget)
    assert sum(size[r] for r in chosen) <= budget
    assert all(r <= layer.wanted for r, layer in zip(chosen, layers, strict=True))
    assert allocate(layers, most) == tuple(layer.wanted for layer in layers)
    left = budget - sum(size[r] for r in chosen)
    for rank, layer in zip(chosen, layers, strict=True):
        above = [r for r in ranks if rank < r <= layer.wanted]
        assert not above or size[above[0]] - size[rank] > left
