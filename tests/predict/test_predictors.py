"""The predictors, held to what a predictor must hold; and what each has of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.backend import open_backend
from flashinfer.backend.bounded import may_exceed
from flashinfer.predict import Certified, Everything, Exact, LowRank, Oracle, Predictor, Span, Threshold
from flashinfer.predict.approximate import Bounds
from flashinfer.predict.criterion import bounds
from flashinfer.tune.sketch import sketch_rows
from tests.predict.predictor_conformance import HIDDEN, LAYERS, NEURONS, PredictorConformance, Weights

Floats = npt.NDArray[np.float32]
GATES = [f"layers.{i}.ffn.gate" for i in range(LAYERS)]


class TestExact(PredictorConformance):
    def make(self, weights: Weights) -> Predictor:
        return Exact(weights.view(), GATES)

    def test_nobody_else_is_named(self, weights: Weights, tokens: Floats) -> None:
        named = self.all_named(weights, self.make(weights), tokens)
        assert np.array_equal(named, self.products(weights, 0, tokens) > 0)

    def test_above_a_threshold(self, weights: Weights, tokens: Floats) -> None:
        """Exactly at it nobody fires."""
        products = self.products(weights, 0, tokens)
        for threshold in (0.5, float(products.max()), float(np.sort(products.reshape(-1))[-5])):
            named = self.all_named(weights, Exact(weights.view(), GATES, threshold), tokens)
            assert np.array_equal(named, products > np.float32(threshold))


class TestEverything(PredictorConformance):
    def make(self, weights: Weights) -> Predictor:
        return Everything(weights.view(), GATES)


class TestEverythingInBundles(PredictorConformance):
    def make(self, weights: Weights) -> Predictor:
        return Everything(weights.view(), [None] * LAYERS)


class TestOracle(PredictorConformance):
    def make(self, weights: Weights) -> Predictor:
        return Oracle(weights.view(), lambda layer, x: self.products(weights, layer, x))


def add_sketches(weights: Weights) -> None:
    for role in GATES:
        values = weights.matrices[f"{role}.weight"][0].astype(np.float16).astype(np.float32)
        sketch = role.replace("gate", "sketch")
        weights.matrices[f"{sketch}.weight"] = values, "int8g32"
        weights.vectors[f"{sketch}.slack"] = sketch_rows(values)[1]
        weights.vectors[f"{sketch}.bias"] = weights.vectors[f"{role}.bias"]


class TestCertified(PredictorConformance):
    def make(self, weights: Weights) -> Predictor:
        add_sketches(weights)
        return Certified(weights.view(), [role.replace("gate", "sketch") for role in GATES])

    def test_most_of_those_who_do_not_fire_are_left_out(self, weights: Weights, tokens: Floats) -> None:
        named = self.all_named(weights, self.make(weights), tokens)
        assert named.mean() < 2 * (self.products(weights, 0, tokens) > 0).mean()

    @pytest.mark.parametrize("threshold", [0.25, 2.0])
    def test_nobody_above_a_threshold_is_left_out(self, weights: Weights, tokens: Floats, threshold: float) -> None:
        add_sketches(weights)
        sketches = [role.replace("gate", "sketch") for role in GATES]
        found = [self.all_named(weights, Certified(weights.view(), sketches, t), tokens) for t in (threshold, 0.0)]
        fires = self.products(weights, 0, tokens) > threshold
        assert fires.any()
        assert found[0][fires].all()
        assert found[0].sum() < found[1].sum()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_a_number_may_exceed(self, weights: Weights, tokens: Floats, bad: float) -> None:
        tokens[2, 5] = bad
        assert self.named(weights, self.guess(weights, self.make(weights), 0, tokens, Span(2, 1)), 1).all()


class TestLowRank(PredictorConformance):
    """Factors of full rank: not thin, so that they know something of a random matrix."""

    shift = 0.0

    def make(self, weights: Weights) -> Predictor:
        for role in GATES:
            factors = role.replace("gate", "lowrank")
            weights.matrices[f"{factors}.a.weight"] = np.eye(HIDDEN, dtype=np.float32), "f32"
            weights.matrices[f"{factors}.b.weight"] = weights.matrices[f"{role}.weight"][0], "int8g32"
            weights.vectors[f"{factors}.b.bias"] = weights.vectors[f"{role}.bias"]
        return LowRank(weights.view(), [role.replace("gate", "lowrank") for role in GATES], [self.shift] * LAYERS)

    def test_a_larger_shift_names_more(self, weights: Weights, tokens: Floats) -> None:
        before = self.all_named(weights, self.make(weights), tokens)
        self.shift = 5.0
        after = self.all_named(weights, self.make(weights), tokens)
        assert after[before].all()
        assert after.sum() > before.sum()


class TestThreshold(PredictorConformance):
    def bounds(self) -> Bounds:
        return bounds("silu", np.full(NEURONS, 0.15, dtype=np.float32))

    def make(self, weights: Weights) -> Predictor:
        return Threshold(weights.view(), GATES, [self.bounds()] * LAYERS)

    def truth(self, weights: Weights, products: Floats) -> npt.NDArray[np.bool_]:
        wide = products.astype(np.float64)
        return np.abs(wide / (1.0 + np.exp(-wide))) > 0.15

    def test_exactly_those_beyond_the_threshold(self, weights: Weights, tokens: Floats) -> None:
        named = self.all_named(weights, self.make(weights), tokens)
        truth = self.truth(weights, self.products(weights, 0, tokens))
        assert 0 < truth.mean() < 1
        assert np.array_equal(named, truth)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(-30, 30), st.floats(-30, 30), st.booleans(),
    st.sampled_from(["f16", "f32"]),
)  # fmt: skip
def test_who_is_left_out_does_not_fire_whatever_the_order_of_the_sum(
    seed: int, width: int, weight_scale: float, input_scale: float, outliers: bool, codec: str
) -> None:
    """The property `certified` rests on: true products are summed in several orders, none of which is positive."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((64, width)) * 2.0**weight_scale).astype(np.float32)
    if codec == "f16":
        rows = np.clip(rows, -60000, 60000).astype(np.float16).astype(np.float32)
    x = (rng.standard_normal(width) * 2.0**input_scale).astype(np.float32)
    if outliers:
        x[:: max(1, width // 3)] *= 1000
    rows[::2] -= (rows[::2] @ x)[:, None] * x / max(1e-30, float(x @ x))  # half of the products nearly vanish
    backend = open_backend("cpu", 1)
    raw, slack = sketch_rows(rows)
    out = backend.zeros(1, len(rows))
    matrix = backend.matrix(raw.reshape(-1), "int8g32", *rows.shape, keep=False)
    backend.linear(out, 0, backend.place(x[None]), matrix)
    sketched = backend.fetch(out)[0]
    named = may_exceed(sketched, x, slack, None)
    backend.close()
    products = rows * x
    threshold = float(np.median(np.abs(rows @ x)))  # one of the products, or between two
    above = may_exceed(sketched, x, slack, None, threshold)
    orders = [products.sum(axis=1), products[:, ::-1].copy().cumsum(axis=1)[:, -1], rows @ x]
    for result in orders:
        assert named[result > 0].all()
        assert above[result > np.float32(threshold)].all()
