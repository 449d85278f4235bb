"""The router of a mixture of experts: which experts each token gets, and how much of each."""

from __future__ import annotations

import numpy as np

from flashinfer.backend import Buffer
from flashinfer.predict.base import Floats, Matrices, Span
from flashinfer.predict.criterion import Wide, sigmoid
from flashinfer.store import Experts, Facts

NEVER_ZERO = 1e-20
"""Added to the sum of the chosen scores before it divides them (as in DeepSeek-V3)."""


def shares(products: Floats, experts: Experts, per_token: int, correction: Floats | None = None) -> Floats:
    """What each token takes of each expert: float32 `[tokens, count]`, zero for those it does not get.

    A row depends on no other row, to the last bit. Of equals the expert of the lower number is chosen.

    products: the router's, float32 `[tokens, count]`. correction: `[count]`, added to sigmoid scores where experts are
    chosen, and there only (arXiv 2412.19437, section 2.1.2).
    """
    scores, ranks = _scores(products.astype(np.float64), experts, correction)
    ranks = _within_groups(ranks, experts)
    chosen = np.argsort(-ranks, axis=1, kind="stable")[:, :per_token]
    taken, rows = np.zeros_like(scores), np.arange(len(scores))[:, None]
    taken[rows, chosen] = scores[rows, chosen]
    if experts.normalised:
        taken /= _sums(taken) + NEVER_ZERO
    return (taken * experts.scale).astype(np.float32)


def _scores(products: Wide, experts: Experts, correction: Floats | None) -> tuple[Wide, Wide]:
    """Scores, and what experts are chosen by. A softmax keeps the order of the products."""
    if experts.scoring == "softmax":
        raised = np.exp(products - products.max(axis=1, keepdims=True))
        return raised / _sums(raised), products
    scores = sigmoid(products)
    return scores, scores if correction is None else scores + correction


def _within_groups(ranks: Wide, experts: Experts) -> Wide:
    """Experts outside a token's best groups are out of the question."""
    if experts.top_groups == experts.groups:
        return ranks
    grouped = ranks.reshape(len(ranks), experts.groups, -1)
    best = np.sort(grouped, axis=2)[:, :, -1 if experts.scoring == "softmax" else -2 :].sum(axis=2)
    lost = np.argsort(-best, axis=1, kind="stable")[:, experts.top_groups :]
    limited = grouped.copy()
    np.put_along_axis(limited, lost[:, :, None], -np.inf, axis=1)
    return limited.reshape(ranks.shape)


def _sums(values: Wide) -> Wide:
    """Sums of rows, one value after the other, whatever is beside them: `[tokens, 1]`."""
    return np.cumsum(values, axis=1)[:, -1:]


class Router:
    """Asks the routers of a model, which say exactly who is needed: other experts do not contribute.

    per_token: how many experts a token gets.
    """

    def __init__(self, matrices: Matrices, facts: Facts, per_token: int) -> None:
        self._matrices, self._facts, self._per_token = matrices, facts, per_token
        roles = (f"layers.{i}.ffn.router.correction" for i in range(facts.num_layers))
        found = (matrices.vector(role) for role in roles)
        self._corrections = [None if c is None else matrices.backend.fetch(c) for c in found]

    def shares(self, layer: int, x: Buffer, span: Span) -> Floats:
        """What each token of a layer of experts takes of each: `[tokens, Experts.columns]`, the shared ones last.

        x: the layer's FFN input `[rows, hidden]`, normed.
        """
        experts = self._facts.routed(layer)
        assert experts is not None
        found = shares(
            self._host(self._matrices.linear(f"layers.{layer}.ffn.router", x), span), experts, self._per_token,
            self._corrections[layer],
        )  # fmt: skip
        if not experts.shared_size:
            return found
        shared = np.ones((span.count, 1), dtype=np.float32)
        if experts.shared_gate:
            gate = self._host(self._matrices.linear(f"layers.{layer}.ffn.shared_gate", x), span)
            shared = sigmoid(gate.astype(np.float64)).astype(np.float32)
        return np.concatenate([found, shared], axis=1)

    def _host(self, y: Buffer, span: Span) -> Floats:
        return self._matrices.backend.products(y, span.skip, span.count)
