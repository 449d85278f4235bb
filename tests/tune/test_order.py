"""Neuron orders: permutations whatever comes in, equal to plain twins, and neurons that fire together come together."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.tune import order as module
from flashinfer.tune.order import bisected_order, hotness, hottest_first, linked_order, unpacked
from tests.tune.firings import Bits, grouped, packed


@st.composite
def firings(draw: st.DrawFn) -> Bits:
    tokens, neurons = draw(st.integers(0, 12)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return rng.random((tokens, neurons)) < rng.random(neurons) * draw(st.sampled_from([0.0, 0.3, 1.0]))


def runs(active: Bits, order: npt.NDArray[np.int64]) -> float:
    """Runs of neighbours a token fires, on average."""
    stored = np.pad(active[:, order].astype(np.int8), ((0, 0), (1, 0)))
    return float((np.diff(stored, axis=1) == 1).sum(axis=1).mean())


@given(firings(), st.integers(1, 40))
def test_every_order_names_each_neuron_once(active: Bits, bridge: int) -> None:
    masks, neurons = packed(active), active.shape[1]
    for order in (
        hottest_first(masks, neurons), linked_order(masks, neurons), bisected_order(masks, neurons, bridge=bridge)
    ):  # fmt: skip
        assert sorted(order.tolist()) == list(range(neurons))


@given(firings())
def test_hotness_counts_tokens(active: Bits) -> None:
    masks, neurons = packed(active), active.shape[1]
    heat = hotness(masks, neurons)
    assert heat.tolist() == active.sum(axis=0).tolist()
    assert (np.diff(heat[hottest_first(masks, neurons)]) <= 0).all()
    assert np.array_equal(unpacked(masks, 0, neurons), active)


def linked_by_a_twin(active: Bits) -> set[frozenset[int]]:
    """The same greedy choice over all pairs at once, with paths as plain lists."""
    counts = active.astype(np.float32)
    both = counts.T @ counts
    heat = np.diag(both)
    pairs = [
        (-np.float32(both[a, b]) / np.float32(heat[a] + heat[b] - both[a, b]), a, b)
        for a, b in combinations(range(active.shape[1]), 2)
        if both[a, b]
    ]
    paths, links = [[n] for n in range(active.shape[1])], set()
    for _, a, b in sorted(pairs):
        mine, other = next(p for p in paths if a in p), next(p for p in paths if b in p)
        if mine is not other and a in (mine[0], mine[-1]) and b in (other[0], other[-1]):
            paths.remove(other)
            mine[:] = (mine if mine[-1] == a else mine[::-1]) + (other if other[0] == b else other[::-1])
            links.add(frozenset((a, b)))
    return links


@given(firings())
def test_links_are_those_of_the_twin(active: Bits) -> None:
    neurons = active.shape[1]
    order = linked_order(packed(active), neurons, edges=neurons)
    neighbours = {frozenset(pair) for pair in pairwise(order.tolist())}
    assert linked_by_a_twin(active) <= neighbours


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    active, _ = grouped(300, 77, 6, seed=1)
    masks = packed(active)
    whole = linked_order(masks, 77, edges=20), bisected_order(masks, 77, bridge=3)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "SAMPLES", 11)
    assert np.array_equal(linked_order(masks, 77, edges=20), whole[0])
    assert np.array_equal(bisected_order(masks, 77, bridge=3), whole[1])


@pytest.mark.parametrize("method", ["linked", "bisected"])
def test_groups_that_fire_together_lie_together_on_other_tokens(method: str) -> None:
    active, group = grouped(1200, 320, 8, seed=2)
    learn, judge = active[:800], active[800:]
    masks = packed(learn)
    order = linked_order(masks, 320) if method == "linked" else bisected_order(masks, 320, bridge=8)
    borders = int(np.count_nonzero(np.diff(group[order])))
    assert borders <= 2 * 8
    assert 2 * runs(judge, order) < runs(judge, np.arange(320))


def test_what_never_fires_comes_last() -> None:
    active, _ = grouped(400, 64, 4, seed=3)
    active[:, 5::7] = False
    dead = set(range(5, 64, 7))
    assert set(linked_order(packed(active), 64)[-len(dead) :].tolist()) == dead


@settings(max_examples=30)
@given(st.integers(2, 30), st.data())
def test_the_cost_of_a_half_is_what_its_reads_take(places: int, data: st.DataObject) -> None:
    """Against neurons that fire independently, on a ring, where every hole has a neuron behind it."""
    active, bridge = data.draw(st.integers(1, places - 1)), data.draw(st.integers(1, 12))
    fires = np.flatnonzero(np.random.default_rng(0).random(400_000) < active / places)
    measured = np.minimum(np.diff(fires) - 1, bridge).sum() / 400_000 * places
    assert module._costs(places, bridge)[active] == pytest.approx(measured, rel=0.03)


def test_masks_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="bits of 80 neurons"):
        hotness(np.zeros((3, 9), dtype=np.uint8), 80)
