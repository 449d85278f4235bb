"""Thresholds: bounds on the gate that decide exactly, scores against a plain twin, and the search for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.predict.criterion import bounds
from flashinfer.store import Activation
from flashinfer.tune import threshold as module
from flashinfer.tune.threshold import LARGEST, GluLayer, score_layer, within_budget

Floats = npt.NDArray[np.float32]

ACTIVATIONS: dict[Activation, Callable[[float], float]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.lists(st.floats(0, 50, width=32) | st.floats(0, 0.25, width=32), min_size=1, max_size=5),
    st.lists(st.floats(-1000, 1000, width=32), max_size=10),
)
def test_bounds_are_where_the_activation_exceeds_the_threshold(
    activation: Activation, thresholds: list[float], gates: list[float]
) -> None:
    t = np.array(thresholds, dtype=np.float32)
    high, low, up = bounds(activation, t)
    for n in range(len(t)):
        near = [np.nextafter(b[n], np.float32(to)) for b in (high, low, up) for to in (-np.inf, np.inf)]
        for g in [*near, high[n], low[n], up[n], *np.array(gates, dtype=np.float32)]:
            size = abs(ACTIVATIONS[activation](float(g)))
            if not math.isclose(size, float(t[n]), rel_tol=1e-14, abs_tol=1e-300):
                assert bool(g > high[n] or low[n] < g < up[n]) == (size > float(t[n])), (activation, g, t[n])


@dataclass(frozen=True)
class Made:
    """A random layer whose neurons differ in size, some of which add nothing, and inputs for it."""

    layer: GluLayer
    act: Floats
    up: Floats
    norm: Floats
    x: Floats


def silu(g: Floats) -> Floats:
    return np.asarray(g / (1 + np.exp(-g)), dtype=np.float32)


def make(neurons: int = 50, tokens: int = 40, seed: int = 0, biases: bool = True) -> Made:
    rng = np.random.default_rng(seed)
    gate, up, down = (rng.standard_normal((neurons, 16)).astype(np.float32) for _ in range(3))
    down *= np.exp(rng.standard_normal((neurons, 1))).astype(np.float32)
    down[::9] = 0
    b, c = (rng.standard_normal(neurons).astype(np.float32) if biases else None for _ in range(2))
    x = rng.standard_normal((tokens, 16)).astype(np.float32)
    layer = GluLayer(
        neurons, silu, lambda i, j: gate[i:j], lambda i, j: up[i:j], lambda i, j: down[i:j], gate_bias=b, up_bias=c
    )
    act, u = silu(x @ gate.T + (0 if b is None else b)), x @ up.T + (0 if c is None else c)
    return Made(layer, act, u, np.linalg.norm(down, axis=1), x)


def twin_weights(made: Made) -> Floats:
    return np.sqrt((made.up**2).mean(axis=0)) * made.norm


@pytest.mark.parametrize("block", [7, 50, 256])
@pytest.mark.parametrize("biases", [False, True])
def test_scores_are_those_of_all_neurons_at_once(monkeypatch: pytest.MonkeyPatch, biases: bool, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    made = make(biases=biases)
    scores = score_layer(made.layer, made.x)
    assert scores.weights == pytest.approx(twin_weights(made), rel=1e-5)
    size = np.abs(made.act) * twin_weights(made)
    for density in (0.05, 0.3, 0.8):
        tau = scores.tau(density)
        assert (size > tau).mean() == pytest.approx(density, abs=0.01)
        assert scores.density(tau) == pytest.approx(density, abs=0.01)
        kept = np.abs(made.act) > scores.thresholds(tau)
        assert (kept == (size > tau)).mean() > 0.999


def test_what_adds_nothing_is_never_kept() -> None:
    made = make()
    scores = score_layer(made.layer, made.x)
    assert (scores.thresholds(scores.tau(0.3))[::9] == LARGEST).all()
    assert (scores.thresholds(0.0)[::9] == LARGEST).all()
    assert (scores.thresholds(0.0)[1:9] == 0).all()
    high, _, _ = bounds("silu", np.array([LARGEST]))
    assert np.isfinite(high[0])
    assert high[0] >= 0.99 * LARGEST


def test_there_must_be_samples() -> None:
    with pytest.raises(ValueError, match="samples"):
        score_layer(make().layer, np.zeros((0, 16), dtype=np.float32))


@given(st.floats(0.02, 0.98), st.integers(0, 5))
def test_a_tau_keeps_the_share_asked_for(density: float, seed: int) -> None:
    made = make(seed=seed)
    scores = score_layer(made.layer, made.x)
    most = float((scores.weights > 0).mean())  # no tau keeps what adds nothing
    assert scores.density(scores.tau(density)) == pytest.approx(min(density, most), abs=0.01)
    assert scores.tau(1.0) == 0
    assert scores.density(0.0) == pytest.approx(most, abs=0.01)


# -- a budget


@given(st.floats(1, 8), st.floats(0.01, 100), st.floats(0.001, 0.2))
def test_power_laws_are_solved_in_a_few_evaluations(power: float, factor: float, budget: float) -> None:
    seen: list[float] = []

    def cost(knob: float) -> float:
        seen.append(knob)
        return float(factor * knob**power)

    if cost(0.05) > budget:
        return
    seen.clear()
    trials = within_budget(cost, budget, low=0.05, high=0.95, evaluations=8)
    assert trials[0].cost <= budget
    assert (
        trials[0].cost >= 0.85 * budget
        or trials[0].knob == 0.95
        or trials[0].knob * 1.02 >= min(t.knob for t in trials if t.cost > budget)
    )
    assert sorted(seen) == sorted(t.knob for t in trials)
    assert len(seen) <= 8


@settings(max_examples=200)
@given(st.integers(0, 10_000), st.integers(2, 9), st.floats(0.001, 0.3), st.booleans())
def test_whatever_the_cost_does_the_chosen_one_was_measured_within_the_budget(
    seed: int, evaluations: int, budget: float, broken: bool
) -> None:
    rng = np.random.default_rng(seed)

    def cost(knob: float) -> float:
        noise = rng.normal(0, 0.02)
        return float("nan") if broken and knob > 0.7 else float(knob**4 + noise * (knob > 0.05))

    trials = within_budget(cost, budget, low=0.05, high=0.95, evaluations=evaluations)
    assert trials[0].cost <= budget
    assert len(trials) <= evaluations
    beyond = [t.knob for t in trials if not t.cost <= budget]
    assert all(t.knob <= trials[0].knob for t in trials if t.cost <= budget and all(t.knob < b for b in beyond))
    assert all(trials[0].knob < b for b in beyond)


def test_the_ends_of_the_knob() -> None:
    assert len(within_budget(lambda knob: 0.001, 0.01, low=0.1, high=0.9)) == 1
    with pytest.raises(ValueError, match="even at"):
        within_budget(lambda knob: 1.0, 0.01, low=0.1, high=0.9)
    with pytest.raises(ValueError, match="nothing to look for"):
        within_budget(lambda knob: knob, 0.0, low=0.1, high=0.9)
