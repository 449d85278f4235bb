"""The router's choice is that of transformers' routers, on whatever products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.predict.router import shares
from flashinfer.store import Experts

Floats = npt.NDArray[np.float32]


def theirs(products: Floats, e: Experts, per_token: int, correction: Floats | None) -> Floats:
    """One token at a time, in torch: softmax or sigmoid, groups, top-k, as DeepSeek's and all simpler routers do."""
    out = np.zeros(products.shape, dtype=np.float32)
    for row, logits in enumerate(torch.from_numpy(products)):
        scores = logits.softmax(-1) if e.scoring == "softmax" else logits.sigmoid()
        ranks = scores if correction is None else scores + torch.from_numpy(correction)
        if e.top_groups < e.groups:
            grouped = ranks.view(e.groups, -1)
            best = grouped.max(-1).values if e.scoring == "softmax" else grouped.topk(2, -1).values.sum(-1)
            keep = torch.zeros(e.groups, dtype=torch.bool)
            keep[best.topk(e.top_groups).indices] = True
            ranks = grouped.masked_fill(~keep[:, None], float("-inf")).reshape(-1)
        chosen = ranks.topk(per_token).indices
        weights = scores[chosen]
        if e.normalised:
            weights = weights / (weights.sum() + 1e-20)
        out[row, chosen.numpy()] = (weights * e.scale).numpy()
    return out


@st.composite
def routed(draw: Any) -> tuple[Floats, Experts, int, Floats | None]:
    groups, each = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    top, scoring = draw(st.integers(1, groups)), draw(st.sampled_from(["softmax", "sigmoid"]))
    per_token = draw(st.integers(1, top * each))
    experts = Experts(
        groups * each, per_token, 8, scoring=scoring, normalised=draw(st.booleans()), groups=groups, top_groups=top,
        scale=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    products = rng.normal(size=(draw(st.integers(1, 5)), experts.count)).astype(np.float32)
    correction = rng.normal(size=experts.count).astype(np.float32) if scoring == "sigmoid" else None
    return products * np.float32(draw(st.sampled_from([0.1, 1.0, 30.0]))), experts, per_token, correction


@settings(max_examples=200, deadline=None)
@given(case=routed())
def test_as_torch_does(case: Any) -> None:
    products, experts, per_token, correction = case
    found = shares(products, experts, per_token, correction)
    # a sigmoid of large products is 1 for many experts: torch chooses any of these, we the first
    if experts.scoring == "softmax" or np.abs(products).max() < 8:
        assert np.allclose(found, theirs(products, experts, per_token, correction), rtol=2e-6, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(case=routed())
def test_a_token_alone_is_the_same_token(case: Any) -> None:
    products, experts, per_token, correction = case
    together = shares(products, experts, per_token, correction)
    alone = [shares(products[i : i + 1], experts, per_token, correction)[0] for i in range(len(products))]
    assert np.array_equal(together, np.stack(alone))


def test_of_equals_the_first() -> None:
    found = shares(np.zeros((1, 6), dtype=np.float32), Experts(6, 2, 8, normalised=True), 2)
    assert found.tolist() == [[0.5, 0.5, 0, 0, 0, 0]]


def test_what_is_not_a_number_is_not_lost() -> None:
    found = shares(np.full((1, 4), np.nan, dtype=np.float32), Experts(4, 2, 8), 2)
    assert np.isnan(found).any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_large_products_do_not_overflow(scoring: Any) -> None:
    products = np.array([[3e38, -3e38, 100.0, -100.0]], dtype=np.float32)
    found = shares(products, Experts(4, 2, 8, scoring=scoring, normalised=True), 2)
    assert found[0, 0] > 0
    assert np.isclose(found.sum(), 1)
