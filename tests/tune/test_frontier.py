"""Frontiers: the histogram says what the scores themselves would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.tune.frontier import RECALLS, Frontier, Operation


def pairs(seed: int, samples: int = 40, neurons: int = 30, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both signs and many sizes, some equal, some 0; who fired scores higher."""
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((samples, neurons)) * spread - 1).astype(np.float32)
    active = scores + rng.standard_normal(scores.shape) * spread > 2
    scores[rng.random(scores.shape) < 0.02] = rng.choice(np.array([0.0, -0.0, 1.5, -40, 1e-30], np.float32))
    return scores, active


def counted(scores: np.ndarray, active: np.ndarray, parts: int = 3) -> Frontier:
    frontier = Frontier()
    for s, a in zip(np.array_split(scores, parts), np.array_split(active, parts), strict=True):
        frontier.add(s, a)
    return frontier


def applied(shift: float, scores: np.ndarray, active: np.ndarray) -> Operation:
    """The shift as the runtime applies it, in float32."""
    named = scores > np.float32(-shift)
    assert (named == (scores + np.float32(shift) > 0)).all()
    fired = max(1, int(active.sum()))
    return Operation(shift, (named & active).sum() / fired if active.any() else 1.0, named.mean(), named.sum() / fired)


def close(a: Operation, b: Operation) -> bool:
    return (a.recall, a.density, a.over) == pytest.approx((b.recall, b.density, b.over))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([*RECALLS, 0.01, 0.5, 1.0]), st.sampled_from([1e-6, 0.1, 2.0, 1e4]))
def test_a_recall_is_reached_and_hardly_surpassed(seed: int, recall: float, spread: float) -> None:
    scores, active = pairs(seed, spread=spread)
    found = counted(scores, active).reaching(recall)
    assert close(found, applied(found.shift, scores, active))
    assert found.recall >= recall or not active.any()
    best = np.sort(scores[active])[::-1][int(np.ceil(recall * active.sum())) - 1] if active.any() else np.inf
    # scores within a bin of the best threshold, which is 2**-9 of a power of two, may be named beside
    needed = (scores >= best).mean() if active.any() else 0.0
    beside = ((scores < best) & (scores > best - abs(best) * 2.0**-8)).mean() if active.any() else 0.0
    assert needed <= found.density <= needed + beside + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(RECALLS))
def test_what_a_found_shift_does_is_known(seed: int, recall: float) -> None:
    frontier = counted(*pairs(seed))
    found = frontier.reaching(recall)
    assert frontier.at(found.shift) == found


def test_an_arbitrary_shift_is_known_to_a_bin() -> None:
    scores, active = pairs(0, 400, 100)
    found, true = counted(scores, active).at(0.7312), applied(0.7312, scores, active)
    assert found.density == pytest.approx(true.density, abs=0.002)
    assert found.recall == pytest.approx(true.recall, abs=0.005)


def test_two_layers_share_a_shift() -> None:
    (s, a), (t, b) = pairs(1), pairs(2, spread=4.0)
    both = counted(s, a) + counted(t, b)
    found = both.reaching(0.95)
    assert found == counted(np.concatenate([s, t]), np.concatenate([a, b])).reaching(0.95)
    apart = [counted(s, a).at(found.shift), counted(t, b).at(found.shift)]
    assert apart[0].recall != apart[1].recall
    assert np.average([o.recall for o in apart], weights=[a.sum(), b.sum()]) == pytest.approx(found.recall)


def test_where_nothing_fires_nobody_is_named() -> None:
    scores, active = pairs(0)
    found = counted(scores, np.zeros_like(active)).reaching(0.95)
    assert (found.recall, found.density, found.over) == (1.0, 0.0, 0.0)
    assert not (scores > -found.shift).any()


def test_nothing_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        Frontier().reaching(0.95)


def test_more_recall_names_more() -> None:
    frontier = counted(*pairs(5, 300, 60))
    found = [frontier.reaching(r) for r in RECALLS]
    assert [o.recall for o in found] == sorted(o.recall for o in found)
    assert [o.over for o in found] == sorted({o.over for o in found})
    assert [o.shift for o in found] == sorted({o.shift for o in found})
