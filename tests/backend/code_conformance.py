"""What every backend must do with codes: rows of scales and codes, multiplied as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashinfer.backend import Backend
from flashinfer.quant import GROUPED, Codec, LlmInt8
from tests.backend.backend_conformance import Layer, fired_for, near, normal, packed_tiles, same, tiles_of
from tests.backend.reference import encoded, rounding_bound, unaligned

LLM_INT8 = LlmInt8((0, 17, 38))
CODES: list[str | Codec] = [*(c.name for c in GROUPED), LLM_INT8]
MIXES: list[tuple[str | Codec, str | Codec]] = [
    ("int4g64", "nf4"),
    ("f16", "mxfp4"),
    ("fp8", "int8g32"),
    ("int8", "f32"),
]


def name_of(codec: Any) -> str:
    return codec if isinstance(codec, str) else codec.name


class CodeConformance:
    """The suite. `make(threads)` opens the backend; `rounding(codec)` is how far off it may take each activation, as a
    share of the largest of its 32 columns."""

    def make(self, threads: int) -> Backend:
        raise NotImplementedError

    def rounding(self, codec: str | Codec) -> float:
        raise NotImplementedError

    @pytest.fixture
    def backend(self):
        backend = self.make(2)
        yield backend
        backend.close()

    @pytest.mark.parametrize("codec", CODES, ids=name_of)
    @pytest.mark.parametrize("cols", [40, 72, 200, 3200])
    def test_rows_are_exact(self, backend: Backend, codec: str | Codec, cols: int) -> None:
        raw, values = encoded(normal(2, 9, cols), codec)
        matrix = backend.matrix(raw.reshape(-1), codec, 9, cols, keep=True)
        assert np.array_equal(backend.rows(matrix, np.array([8, 0, 0, 3])), values[[8, 0, 0, 3]])

    @pytest.mark.parametrize("codec", CODES, ids=name_of)
    @pytest.mark.parametrize(("rows", "cols"), [(1, 39), (3, 40), (17, 72), (131, 200), (9, 3200)])
    @pytest.mark.parametrize("tokens", [1, 16])
    def test_linear(self, backend: Backend, codec: str | Codec, rows: int, cols: int, tokens: int) -> None:
        raw, values = encoded(normal(3, rows, cols), codec)
        x = normal(4, tokens, cols)
        out = backend.place(np.full((tokens, rows + 9), 7, np.float32))
        backend.linear(out, 4, backend.place(x), backend.matrix(unaligned(raw), codec, rows, cols, keep=False))
        found = backend.fetch(out)
        off = np.abs(found[:, 4 : 4 + rows] - x.astype(np.float64) @ values.T)
        assert (off <= rounding_bound(x, values, self.rounding(codec))).all()
        assert (found[:, :4] == 7).all()
        assert (found[:, 4 + rows :] == 7).all()

    @pytest.mark.parametrize("codec", CODES, ids=name_of)
    @pytest.mark.parametrize("tokens", [1, 48])
    def test_decide(self, backend: Backend, codec: str | Codec, tokens: int) -> None:
        """The bits of the separate matrix are added, wherever the bundles lie, and nothing else is written."""
        layer = Layer(codec, 150, 72, gated=True, bias=True, decision=True)
        x, before = backend.place(normal(7, tokens, 72)), np.full((tokens, 150), 7, np.float32)
        needed = np.flatnonzero(np.random.default_rng(3).random(150) < 0.5)
        before[:, ::2] = 0
        expected = before.copy()
        expected[:, needed] += layer.products(backend, x, before)[:, needed]
        gate, index = backend.place(before), packed_tiles(needed)
        backend.decide(gate, x, index, layer.memory, layer.offsets(index), layer.bundle)
        assert same(backend.fetch(gate), expected)

    @pytest.mark.parametrize(("codec", "down"), [*((c, c) for c in CODES), *MIXES], ids=name_of)
    @pytest.mark.parametrize("tokens", [1, 16])
    @pytest.mark.parametrize("share", [1.0, 0.3])
    @pytest.mark.parametrize("width", [40, 200])
    def test_ffn(
        self, backend: Backend, codec: str | Codec, down: str | Codec, tokens: int, share: float, width: int
    ) -> None:
        layer, index = Layer(codec, 90, width, gated=True, bias=True, down=down), tiles_of(90)
        x, acc, fired = normal(7, tokens, width), normal(8, tokens, width), fired_for(tokens, index, share)
        placed = backend.place(acc)
        backend.ffn(placed, backend.place(x), backend.place(fired), layer.memory, layer.offsets(index), layer.bundle)
        tolerance = 2e-5 + 8 * self.rounding(codec)
        assert near(backend.fetch(placed), layer.expected(acc, x, fired, index), tolerance)

    @pytest.mark.parametrize("codec", CODES, ids=name_of)
    @pytest.mark.parametrize("width", [40, 200, 3200])
    def test_a_neuron_alone_adds_its_decoded_row(self, backend: Backend, codec: str | Codec, width: int) -> None:
        layer, index = Layer(codec, 5, width, gated=False, bias=False), tiles_of(5)
        for n in range(5):
            acc, fired = backend.zeros(1, width), np.zeros((1, 1, 64), np.float32)
            fired[0, 0, n] = 1
            backend.ffn(acc, acc, backend.place(fired), layer.memory, layer.offsets(index), layer.bundle)
            assert np.array_equal(backend.fetch(acc)[0], layer.down[n])

    @pytest.mark.parametrize("codec", CODES, ids=name_of)
    def test_zeros_and_what_is_not_finite(self, backend: Backend, codec: str | Codec) -> None:
        """Tokens of zeros give zeros, one that is not finite nothing finite, and its neighbours do not notice."""
        raw, values = encoded(normal(3, 5, 72), codec)
        x = normal(4, 16, 72)
        x[3], x[5, 40], x[6, 1] = 0, np.inf, np.nan
        out = backend.zeros(16, 5)
        backend.linear(out, 0, backend.place(x), backend.matrix(raw.reshape(-1), codec, 5, 72, keep=False))
        found, fine = backend.fetch(out), np.delete(np.arange(16), [5, 6])
        assert not found[3].any()
        assert not np.isfinite(found[5:7]).any()
        off = np.abs(found[fine] - x[fine].astype(np.float64) @ values.T)
        assert (off <= rounding_bound(x[fine], values, self.rounding(codec))).all()
