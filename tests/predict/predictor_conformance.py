"""What every predictor must hold. A test class subclasses `PredictorConformance` and says how to make one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from flashinfer.backend import Backend, Buffer, has_native, open_backend
from flashinfer.config import TILE_TOKENS, BackendName
from flashinfer.predict import Guess, Matrices, Predictor, Span
from flashinfer.quant import codec_named

HIDDEN, NEURONS, LAYERS = 96, 200, 2
Floats = npt.NDArray[np.float32]


@dataclass
class Weights:
    """Matrices by role, `.weight` included, and vectors, on a backend."""

    backend: Backend
    matrices: dict[str, tuple[Floats, str]] = field(default_factory=dict)
    vectors: dict[str, Floats] = field(default_factory=dict)

    def product(self, role: str, x: Buffer) -> Buffer:
        values, codec = self.matrices[role]
        raw = codec_named(codec).encode(values).reshape(-1)
        out = self.backend.zeros(len(x), len(values))
        self.backend.linear(out, 0, x, self.backend.matrix(raw, codec, *values.shape, keep=False))
        return out

    def linear(self, role: str, x: Buffer) -> Buffer:
        out, bias = self.product(f"{role}.weight", x), self.vectors.get(f"{role}.bias")
        return out if bias is None else self.backend.add(out, self.backend.vector(bias))

    def view(self) -> Matrices:
        def vector(role: str) -> Buffer | None:
            return self.backend.vector(self.vectors[role]) if role in self.vectors else None

        return Matrices(self.backend, self.product, self.linear, vector)


def decision_weights(backend: Backend, seed: int = 0) -> Weights:
    """Two layers of a random decision matrix with a bias that leaves about a tenth positive."""
    rng, weights = np.random.default_rng(seed), Weights(backend)
    for layer in range(LAYERS):
        matrix = rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32)
        weights.matrices[f"layers.{layer}.ffn.gate.weight"] = matrix, "f16"
        weights.vectors[f"layers.{layer}.ffn.gate.bias"] = rng.normal(-12, 3, NEURONS).astype(np.float32)
    return weights


class PredictorConformance:
    """Subclasses: `make`, and `truth` where a neuron that fires is something else than a positive product."""

    def make(self, weights: Weights) -> Predictor:
        raise NotImplementedError

    def truth(self, weights: Weights, products: Floats) -> npt.NDArray[np.bool_]:
        return products > 0

    @pytest.fixture(params=["native", "torch"])
    def weights(self, request: pytest.FixtureRequest) -> Iterator[Weights]:
        name: BackendName = request.param
        if name == "native" and not has_native():
            pytest.skip("the native core was not built")
        backend = open_backend("cpu", 1, name)
        yield decision_weights(backend)
        backend.close()

    @pytest.fixture
    def tokens(self) -> Floats:
        return np.random.default_rng(1).standard_normal((TILE_TOKENS, HIDDEN)).astype(np.float32)

    def guess(self, weights: Weights, predictor: Predictor, layer: int, tokens: Floats, span: Span) -> Guess:
        return predictor.guess(layer, weights.backend.place(tokens), span)

    def products(self, weights: Weights, layer: int, tokens: Floats) -> Floats:
        whole = weights.linear(f"layers.{layer}.ffn.gate", weights.backend.place(tokens))
        return weights.backend.fetch(whole)

    def named(self, weights: Weights, guess: Guess, tokens: int) -> npt.NDArray[np.bool_]:
        if guess.needed is None:
            return np.ones((tokens, NEURONS), dtype=bool)
        found = weights.backend.marks(guess.needed)
        assert found.dtype == bool
        assert found.shape == (tokens, NEURONS)
        return found

    def all_named(self, weights: Weights, predictor: Predictor, tokens: Floats) -> npt.NDArray[np.bool_]:
        """Of the first layer, by all of the tokens."""
        return self.named(weights, self.guess(weights, predictor, 0, tokens, Span(0, len(tokens))), len(tokens))

    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_an_exact_one_leaves_out_nobody_who_fires(self, weights: Weights, tokens: Floats, layer: int) -> None:
        predictor = self.make(weights)
        named = self.named(weights, self.guess(weights, predictor, layer, tokens, Span(0, len(tokens))), len(tokens))
        fires = self.truth(weights, self.products(weights, layer, tokens))
        assert fires.any()
        if predictor.exact:
            assert named[fires].all()
        else:
            assert named[fires].mean() > 0.5  # an approximation knows more than a coin

    def test_padding_rows_do_not_count(self, weights: Weights, tokens: Floats) -> None:
        predictor = self.make(weights)
        some = self.guess(weights, predictor, 0, tokens, Span(3, 5))
        whole = self.guess(weights, predictor, 0, tokens, Span(0, len(tokens)))
        assert np.array_equal(self.named(weights, some, 5), self.named(weights, whole, len(tokens))[3:8])

    def test_a_token_alone_is_told_the_same(self, weights: Weights, tokens: Floats) -> None:
        if not weights.backend.name.startswith("native"):
            pytest.skip("torch's products of one token and of several differ in their last bits")
        predictor = self.make(weights)
        whole = self.named(weights, self.guess(weights, predictor, 1, tokens, Span(0, len(tokens))), len(tokens))
        for i in range(len(tokens)):
            alone = self.guess(weights, predictor, 1, tokens[i : i + 1], Span(0, 1))
            assert np.array_equal(self.named(weights, alone, 1)[0], whole[i])

    def test_products_that_are_known_are_the_true_ones(self, weights: Weights, tokens: Floats) -> None:
        guess = self.guess(weights, self.make(weights), 0, tokens, Span(0, len(tokens)))
        if guess.gate is not None:
            assert np.array_equal(weights.backend.fetch(guess.gate), self.products(weights, 0, tokens))

    def test_only_an_approximation_takes_neurons_away(self, weights: Weights, tokens: Floats) -> None:
        predictor = self.make(weights)
        guess = self.guess(weights, predictor, 0, tokens, Span(0, len(tokens)))
        assert predictor.exact != guess.final
        assert predictor.name
