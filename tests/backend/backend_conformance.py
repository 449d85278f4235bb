"""What every backend must do. A backend's test class inherits from `BackendConformance`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from flashinfer.backend import Backend, Bundle, Part, Scoring
from flashinfer.backend.bounded import may_exceed
from flashinfer.config import KV_CODECS, TILE_KEYS, TILE_NEURONS, KvType
from flashinfer.quant import Codec, codec_named
from flashinfer.store.facts import Activation, UpActivation
from tests.backend.reference import activated, attended, encoded, normed, unaligned

TOKENS = [1, 16, 48]
CODECS = ["f32", "f16", "bf16", "int8g32"]


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def near(found: Any, expected: Any, tolerance: float = 2e-5) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max()))


class Layer:
    """Bundles of a layer in any order, in a memory that starts at an odd address with a bundle of zeros.

    decision: the decision matrix is in the bundles, too; `bias` is of both. down: the codec of the down rows, where it
    is another one.
    """

    def __init__(
        self,
        codec: str | Codec,
        neurons: int,
        width: int,
        *,
        gated: bool,
        bias: bool,
        decision: bool = False,
        seed: int = 1,
        down: str | Codec | None = None,
        up_activation: UpActivation | None = None,
    ) -> None:
        self.up, self.down, self.bias, self.decision_bias = None, None, None, None
        self.raw_decision = np.zeros((0, 0), np.uint8)
        columns, parts, at = [], {}, 0
        for name, elements, wanted, kind in [
            ("up", width, gated, codec), ("down", width, True, down or codec), ("bias", 1, gated and bias, "f32"),
            ("decision", width, decision, codec), ("decision_bias", 1, decision and bias, "f32"),
        ]:  # fmt: skip
            if wanted:
                raw, values = encoded(normal(seed + len(parts), neurons, elements) / np.sqrt(elements), kind)
                setattr(self, name, values)
                if name == "decision":
                    self.raw_decision = raw
                parts[name] = Part(at, elements, kind)
                columns.append(raw)
                at += raw.shape[1]
        order = np.random.default_rng(seed).permutation(neurons)
        self.place_of = np.argsort(order)
        self.memory = unaligned(np.concatenate([np.zeros((1, at), np.uint8), np.concatenate(columns, axis=1)[order]]))
        self.bundle = Bundle(
            at, parts["down"], parts.get("up"), parts.get("bias"), parts.get("decision"), parts.get("decision_bias"),
            up_activation,
        )  # fmt: skip

    def offsets(self, index: Any) -> Any:
        return np.where(index < 0, 0, self.place_of[index] + 1) * self.bundle.bytes

    def products(self, backend: Backend, x: Any, before: Any) -> Any:
        """What `linear` and `add` give on the whole decision matrix; `before`: `[tokens, neurons]`."""
        rows, cols = len(self.raw_decision), self.bundle.down.elements
        whole = backend.matrix(self.raw_decision.reshape(-1), self.bundle.decision.codec, rows, cols, keep=False)
        out = backend.place(before)
        backend.linear(out, 0, x, whole)
        if self.decision_bias is not None:
            out = backend.add(out, backend.vector(self.decision_bias[:, 0].astype(np.float32)))
        return backend.fetch(out)

    def expected(self, acc: Any, x: Any, fired: Any, index: Any) -> Any:
        out = acc.astype(np.float64)
        for tile, row in enumerate(index):
            for place, n in enumerate(row):
                if n < 0:
                    continue
                h = fired[tile, :, place].astype(np.float64)
                if self.up is not None:
                    up = x @ self.up[n] + (0 if self.bias is None else self.bias[n, 0])
                    of_up = self.bundle.up_activation
                    h = h * (up if of_up is None else activated(up, of_up))
                out += h[:, None] * self.down[n]
        return out


def fired_for(tokens: int, index: Any, share: float, seed: int = 5) -> Any:
    rng = np.random.default_rng(seed)
    fired = rng.standard_normal((len(index), tokens, TILE_NEURONS)).astype(np.float32)
    fired[rng.random(fired.shape) >= share] = 0
    return np.where(index[:, None, :] < 0, np.float32(0), fired)


def tiles_of(neurons: int) -> Any:
    return packed_tiles(np.arange(neurons))


def packed_tiles(needed: Any) -> Any:
    """Neurons one after the other, as decode has them."""
    index = np.full((-(-len(needed) // TILE_NEURONS), TILE_NEURONS), -1, dtype=np.int64)
    index.reshape(-1)[: len(needed)] = needed
    return index


def places_in_tiles(needed: Any, neurons: int) -> Any:
    """Every neuron at its own place, as prefill has them."""
    index = tiles_of(neurons)
    index[~np.isin(index, needed)] = -1
    return index


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return bool(np.array_equal(np.ascontiguousarray(a).view(np.int32), np.ascontiguousarray(b).view(np.int32)))


def _slopes(heads: int) -> Any:
    return (0.3 / np.arange(1, heads + 1)).astype(np.float32)


SCORINGS: dict[str, Callable[[int], Scoring]] = {
    "window": lambda heads: Scoring(window=37),
    "narrow": lambda heads: Scoring(window=3),
    "cap": lambda heads: Scoring(softcap=1.5),
    "slopes": lambda heads: Scoring(slopes=_slopes(heads)),
    "sinks": lambda heads: Scoring(sinks=normal(9, heads) * 3),
    "all": lambda heads: Scoring(1.5, _slopes(heads), 70, normal(9, heads) * 3),
}


def rounded(values: Any, kv_type: KvType, dim: int) -> Any:
    """Keys or values `[tokens, heads * dim]` as a cache of that type keeps them."""
    codec = codec_named(KV_CODECS[kv_type])
    return codec.decode(codec.encode(values.reshape(-1, dim)), dim).reshape(values.shape)


class BackendConformance:
    """The suite. `make(threads)` opens the backend."""

    def make(self, threads: int) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def backend(self):
        backend = self.make(2)
        yield backend
        backend.close()

    # -- buffers

    def test_says_what_it_is(self, backend: Backend) -> None:
        assert backend.name
        assert backend.threads == 2

    def test_buffers_are_copies(self, backend: Backend) -> None:
        values = normal(1, 3, 5)
        x = backend.place(values)
        kept = values.copy()
        values[:] = 0
        assert np.array_equal(backend.fetch(x), kept)
        one = backend.take(x, np.array([2]))
        some = backend.take(x, np.array([2, 0]))
        backend.add(x, x)
        assert np.array_equal(backend.fetch(one), kept[2:])
        assert np.array_equal(backend.fetch(some), kept[[2, 0]])
        backend.put(x, np.array([0, 2]), some)
        assert np.array_equal(backend.fetch(x), [kept[2], 2 * kept[1], kept[0]])
        fetched = backend.fetch(one)
        backend.add(one, one)
        assert np.array_equal(fetched, kept[2:])
        assert not backend.fetch(backend.zeros(2, 7)).any()
        assert backend.fetch(backend.empty(2, 7)).shape == (2, 7)

    @pytest.mark.parametrize("codec", CODECS)
    def test_rows_are_exact(self, backend: Backend, codec: str) -> None:
        raw, values = encoded(normal(2, 9, 21), codec)
        matrix = backend.matrix(raw.reshape(-1), codec, 9, 21, keep=True)
        assert np.array_equal(backend.rows(matrix, np.array([8, 0, 0, 3])), values[[8, 0, 0, 3]])

    # -- dense parts

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (17, 16), (130, 33), (257, 100), (300, 1056)])
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_linear(self, backend: Backend, codec: str, rows: int, cols: int, tokens: int) -> None:
        raw, values = encoded(normal(3, rows, cols), codec)
        x = normal(4, tokens, cols)
        out = backend.place(np.full((tokens, rows + 9), 7, np.float32))
        backend.linear(out, 4, backend.place(x), backend.matrix(raw.reshape(-1), codec, rows, cols, keep=False))
        found = backend.fetch(out)
        assert near(found[:, 4 : 4 + rows], x @ values.T)
        assert (found[:, :4] == 7).all()
        assert (found[:, 4 + rows :] == 7).all()

    @pytest.mark.parametrize("cols", [1, 16, 31, 32, 33, 48, 63, 511, 512, 545])
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_int8g32_has_the_bits_of_the_decoded_matrix(self, backend: Backend, cols: int, tokens: int) -> None:
        raw, values = encoded(normal(5, 139, cols), "int8g32")
        x, results = backend.place(normal(6, tokens, cols)), []
        for codec, data in (("int8g32", raw), ("f32", values.astype(np.float32).view(np.uint8))):
            out = backend.zeros(tokens, 139)
            backend.linear(out, 0, x, backend.matrix(data.reshape(-1), codec, 139, cols, keep=False))
            results.append(backend.fetch(out))
        assert same(*results)

    @pytest.mark.parametrize("width", [1, 16, 50, 259])
    @pytest.mark.parametrize("kind", ["rms", "layer"])
    @pytest.mark.parametrize("given", [(False, False), (True, False), (True, True)])
    def test_norm(self, backend: Backend, width: int, kind: Any, given: tuple[bool, bool]) -> None:
        x = normal(6, 3, width) * 5 + 2
        weight, bias = (normal(i, width) if given[i] else None for i in (0, 1))
        if kind == "rms":
            bias = None
        vectors = [None if v is None else backend.vector(v) for v in (weight, bias)]
        found = backend.fetch(backend.norm(backend.place(x), *vectors, kind, 1e-5))
        assert near(found, normed(x, weight, bias, kind, 1e-5), 1e-4)

    @pytest.mark.parametrize("kind", ["rms", "layer"])
    def test_norm_of_each_part_of_a_row(self, backend: Backend, kind: Any) -> None:
        x, weight = normal(6, 5, 60) * 5 + 2, normal(1, 20)
        found = backend.fetch(backend.norm(backend.place(x), backend.vector(weight), None, kind, 1e-5, 20))
        parts = [normed(part, weight, None, kind, 1e-5) for part in np.split(x, 3, axis=1)]
        assert near(found, np.concatenate(parts, axis=1), 1e-4)

    def test_multiply(self, backend: Backend) -> None:
        x, vector = normal(1, 3, 20), normal(3, 20)
        placed = backend.place(x)
        assert backend.multiply(placed, 0.22) is placed
        assert np.array_equal(backend.fetch(placed), x * np.float32(0.22))
        assert np.array_equal(backend.fetch(backend.multiply(placed, backend.vector(vector))),
                              x * np.float32(0.22) * vector)  # fmt: skip

    def test_add(self, backend: Backend) -> None:
        x, y, vector = normal(1, 3, 20), normal(2, 3, 20), normal(3, 20)
        placed = backend.place(x)
        assert backend.add(placed, backend.place(y)) is placed
        assert np.array_equal(backend.fetch(backend.add(placed, backend.vector(vector))), x + y + vector)

    @pytest.mark.parametrize(("dim", "half"), [(8, 4), (20, 6), (64, 32)])
    @pytest.mark.parametrize("tokens", [1, 16])
    def test_rotate(self, backend: Backend, dim: int, half: int, tokens: int) -> None:
        x, angle = normal(1, tokens, 3 * dim), np.random.default_rng(2).random((tokens + 8, half))
        tables = [turn(angle).astype(np.float32) for turn in (np.cos, np.sin)]
        placed = (backend.vector(table) for table in tables)
        found = backend.fetch(backend.rotate(backend.place(x), dim, *placed, 5))
        cos, sin = (table[5 : 5 + tokens] for table in tables)
        expected = x.reshape(tokens, 3, dim).astype(np.float64)
        a, b = expected[..., :half].copy(), expected[..., half : 2 * half].copy()
        expected[..., :half] = a * cos[:, None] - b * sin[:, None]
        expected[..., half : 2 * half] = b * cos[:, None] + a * sin[:, None]
        assert near(found, expected.reshape(tokens, -1), 1e-6)

    def test_share(self, backend: Backend) -> None:
        x, shared = normal(1, 5, 3 * 4), normal(2, 5, 6)
        found = backend.fetch(backend.share(backend.place(x), backend.place(shared), 3)).reshape(5, 3, 10)
        assert np.array_equal(found[:, :, 6:], x.reshape(5, 3, 4))
        assert all(np.array_equal(found[:, head, :6], shared) for head in range(3))

    # -- attention

    @pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "dim", "value_dim"),
        [(4, 4, 16, 16), (6, 2, 20, 20), (9, 1, 40, 40), (4, 4, 40, 24), (6, 2, 7, 33)],
    )
    def test_attention(self, backend: Backend, dtype: Any, heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
        tokens = 160
        q, k, v = (
            normal(i, tokens, width) for i, width in enumerate((heads * dim, kv_heads * dim, kv_heads * value_dim))
        )
        kv = backend.new_kv(kv_heads, dim, tokens, dtype, value_dim)
        backend.append_kv(kv, 0, backend.place(k), backend.place(v), 0, 150)
        backend.append_kv(kv, 150, backend.place(k), backend.place(v), 150, 10)
        k, v = rounded(k, dtype, dim), rounded(v, dtype, value_dim)
        assert all(map(np.array_equal, backend.fetch_kv(kv, tokens), (k, v)))
        expected = attended(q, k, v, 0, heads)
        assert near(backend.fetch(backend.attend(backend.place(q), kv, 0, heads)), expected)
        assert near(backend.fetch(backend.attend(backend.place(q[131:132]), kv, 131, heads)), expected[131:132])

    @pytest.mark.parametrize("scoring", SCORINGS)
    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
    def test_scoring(self, backend: Backend, scoring: str, heads: int, kv_heads: int) -> None:
        tokens, dim = 208, 20
        q, k, v = (
            normal(1, tokens, heads * dim) * 3,
            normal(2, tokens, kv_heads * dim),
            normal(3, tokens, kv_heads * dim),
        )
        kv = backend.new_kv(kv_heads, dim, tokens, "f32")
        backend.append_kv(kv, 0, backend.place(k), backend.place(v), 0, tokens)
        some = SCORINGS[scoring](heads)
        expected = attended(q, k, v, 0, heads, some)
        assert near(backend.fetch(backend.attend(backend.place(q), kv, 0, heads, some)), expected)
        for t in (0, 5, 64, 131, 207):
            one = backend.attend(backend.place(q[t : t + 1]), kv, t, heads, some)
            assert near(backend.fetch(one), expected[t : t + 1])
        assert not near(attended(q, k, v, 0, heads), expected)

    @pytest.mark.parametrize("window", [1, 9, 128, 200])
    def test_what_lies_beyond_the_window_is_not_looked_at(self, backend: Backend, window: int) -> None:
        heads, dim, tokens, at = 2, 8, 432, 384
        q, k, v = (normal(i, tokens, heads * dim) for i in range(3))
        seen = (at - window + 1) // TILE_KEYS * TILE_KEYS  # torch masks keys within a tile
        results = []
        for spoilt in (0.0, np.nan):
            keys, values = k.copy(), v.copy()
            keys[:seen] += spoilt
            values[:seen] += spoilt
            kv = backend.new_kv(heads, dim, tokens, "f32")
            backend.append_kv(kv, 0, backend.place(keys), backend.place(values), 0, tokens)
            for rows in (slice(at, at + 32), slice(at, at + 1)):
                found = backend.attend(backend.place(q[rows]), kv, at, heads, Scoring(window=window))
                results.append(backend.fetch(found))
        assert same(results[0], results[2])
        assert same(results[1], results[3])

    @pytest.mark.parametrize("scoring", SCORINGS)
    def test_attention_does_not_depend_on_the_chunks(self, backend: Backend, scoring: str) -> None:
        """Tokens of a chunk give the same bits with longer chunks, and with later keys already there."""
        heads, dim, tokens = 4, 24, 144
        q, k, v = (normal(i, tokens, heads * dim) for i in range(3))
        some = SCORINGS[scoring](heads)
        kv = backend.new_kv(heads, dim, tokens, "f32")
        pieces = []
        for first, last in [(0, 16), (16, 112), (112, 144)]:
            backend.append_kv(kv, first, *(backend.place(a[first:last]) for a in (k, v)), 0, last - first)
            pieces.append(backend.fetch(backend.attend(backend.place(q[first:last]), kv, first, heads, some)))
        whole = backend.fetch(backend.attend(backend.place(q), kv, 0, heads, some))
        assert np.array_equal(np.concatenate(pieces), whole)

    def test_padding_rows_may_lie_beyond_the_capacity(self, backend: Backend) -> None:
        kv = backend.new_kv(2, 8, 21, "f32")
        q, k = normal(1, 16, 16), normal(2, 16, 16)
        backend.append_kv(kv, 16, backend.place(k), backend.place(k), 0, 5)
        assert np.isfinite(backend.fetch(backend.attend(backend.place(q), kv, 16, 2))).all()

    # -- feed-forward

    def test_products(self, backend: Backend) -> None:
        gate = np.array([[1, -1, 0.0], [-0.0, 2, np.nan], [3, -np.inf, 1e-45]], dtype=np.float32)
        found = backend.products(backend.place(gate), 1, 2)
        assert found.dtype == np.float32
        assert same(found, gate[1:])
        with pytest.raises(ValueError, match="read-only"):
            found[0, 0] = 1

    def test_flags(self, backend: Backend) -> None:
        mask = np.random.default_rng(1).random((3, 40)) < 0.5
        found = backend.marks(backend.flags(mask))
        assert found.dtype == bool
        assert np.array_equal(found, mask)

    def test_exceeds(self, backend: Backend) -> None:
        x = normal(1, 5, 40)
        x[2, :5] = np.nan, np.inf, -np.inf, 0.5, -0.0
        high, low, up = (np.sort(normal(2, 3, 40), axis=0)[i] for i in (2, 0, 1))
        placed, some = backend.place(x), x[1:4]
        assert np.array_equal(backend.marks(backend.exceeds(placed, 1, 3, 0.5)), some > 0.5)
        between = backend.vector(low), backend.vector(up)
        found = backend.marks(backend.exceeds(placed, 1, 3, backend.vector(high), between))
        assert np.array_equal(found, (some > high) | ((some > low) & (some < up)))

    @pytest.mark.parametrize("bias", [False, True])
    def test_may_exceed(self, backend: Backend, bias: bool) -> None:
        """As the twin has it, but for what is nearer than the bound's own rounding."""
        x, y, biases = normal(1, 4, 24), normal(2, 4, 40) * 9, normal(3, 1, 40)[0]
        slack = np.abs(normal(4, 1, 40)[0])
        slack[:4], y[1, 7], y[2, 8], x[2, 1] = 0, np.nan, np.inf, 2.0**110
        vectors = backend.vector(slack), backend.vector(biases) if bias else None
        found = backend.may_exceed(backend.place(y), backend.place(x), 1, 3, *vectors, 0.5)
        twin = [may_exceed(y[i], x[i], slack, biases if bias else None, 0.5) for i in (1, 2, 3)]
        assert np.array_equal(backend.marks(found), np.stack(twin))

    def test_limit(self, backend: Backend) -> None:
        gate = normal(1, 5, 40)
        gate[2, :3] = np.nan, np.inf, -1
        keep = np.random.default_rng(2).random((3, 40)) < 0.5
        keep[0] = True
        keep[1, :3] = False
        placed = backend.place(gate)
        backend.limit(placed, 1, backend.flags(keep))
        expected = gate.copy()
        expected[1:4][~keep] = 0
        assert same(backend.fetch(placed), expected)
        backend.limit(placed, 5, backend.flags(keep[:0]))
        assert same(backend.fetch(placed), expected)

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
    @pytest.mark.parametrize("width", [40, 133])
    def test_decide(self, backend: Backend, codec: str, bias: bool, tokens: int, share: float, width: int) -> None:
        """The bits of the separate matrix are added, wherever the bundles lie, and nothing else is written."""
        layer = Layer(codec, 300, width, gated=True, bias=bias, decision=True)
        x, before = backend.place(normal(7, tokens, width)), np.full((tokens, 300), 7, np.float32)
        needed = np.flatnonzero(np.random.default_rng(3).random(300) < share)
        before[:, ::2] = 0
        expected = before.copy()
        expected[:, needed] += layer.products(backend, x, before)[:, needed]
        for index in (packed_tiles(needed), places_in_tiles(needed, 300)):
            gate = backend.place(before)
            backend.decide(gate, x, index, layer.memory, layer.offsets(index), layer.bundle)
            assert same(backend.fetch(gate), expected)

    def test_decide_on_nothing(self, backend: Backend) -> None:
        layer = Layer("f16", 100, 40, gated=False, bias=False, decision=True)
        gate, x = backend.place(normal(1, 1, 100)), backend.place(normal(2, 1, 40))
        before = backend.fetch(gate)
        for index in (np.full((1, TILE_NEURONS), -1), np.zeros((0, TILE_NEURONS), np.int64)):
            backend.decide(gate, x, index, layer.memory, layer.offsets(index), layer.bundle)
        assert same(backend.fetch(gate), before)

    @pytest.mark.parametrize("kind", get_args(Activation) + get_args(UpActivation))
    @pytest.mark.parametrize("tokens", [1, 16])
    def test_fire(self, backend: Backend, kind: Any, tokens: int) -> None:
        gate = normal(1, tokens, 150) * 8
        gate[:, :12] = [0, -0.0, 1e-30, -1e-30, 30, -30, 88.8, -87.5, 100, -100, 1000, -1000]
        index = np.random.default_rng(2).permutation(192).reshape(3, TILE_NEURONS) - 42
        found = backend.fetch(backend.fire(backend.place(gate), kind, index, 0.75))
        assert found.shape == (3, tokens, TILE_NEURONS)
        expected = np.where(index < 0, 0, activated(gate, kind, 0.75)[:, np.maximum(index, 0)]).swapaxes(0, 1)
        assert np.allclose(found, expected, rtol=3e-6, atol=2e-6)

    @pytest.mark.parametrize("tokens", [1, 16])
    def test_fire_without_an_activation(self, backend: Backend, tokens: int) -> None:
        """The products themselves, to the bit."""
        gate = normal(1, tokens, 150)
        index = np.random.default_rng(2).permutation(192).reshape(3, TILE_NEURONS) - 42
        found = backend.fetch(backend.fire(backend.place(gate), None, index))
        expected = np.where(index < 0, np.float32(0), gate[:, np.maximum(index, 0)]).swapaxes(0, 1)
        assert same(found, expected)

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_weigh(self, backend: Backend, tokens: int) -> None:
        """Zero makes zero, of infinity and of what is no number, too."""
        gate = normal(1, tokens, 2 * TILE_NEURONS)
        gate[:, :2] = np.inf, np.nan
        index = np.arange(2 * TILE_NEURONS).reshape(2, TILE_NEURONS)
        fired = backend.fire(backend.place(gate), "relu", index)
        weights = np.abs(normal(2, 2, tokens)) * (np.random.default_rng(3).random((2, tokens)) < 0.7)
        weights[0, 0] = 0
        before = backend.fetch(fired)
        backend.weigh(fired, weights.astype(np.float32))
        with np.errstate(invalid="ignore"):
            expected = before * weights.astype(np.float32)[:, :, None]
        expected[weights == 0] = 0
        assert np.array_equal(backend.fetch(fired), expected, equal_nan=True)

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, False)])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
    @pytest.mark.parametrize("width", [40, 133])
    def test_ffn(
        self, backend: Backend, codec: str, gated: bool, bias: bool, tokens: int, share: float, width: int
    ) -> None:
        layer, index = Layer(codec, 150, width, gated=gated, bias=bias), tiles_of(150)
        x, acc, fired = normal(7, tokens, width), normal(8, tokens, width), fired_for(tokens, index, share)
        placed = backend.place(acc)
        backend.ffn(placed, backend.place(x), backend.place(fired), layer.memory, layer.offsets(index), layer.bundle)
        assert near(backend.fetch(placed), layer.expected(acc, x, fired, index))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("of_up", get_args(UpActivation))
    def test_products_with_up_are_activated(
        self, backend: Backend, bias: bool, tokens: int, of_up: UpActivation
    ) -> None:
        layer, index = Layer("f16", 150, 40, gated=True, bias=bias, up_activation=of_up), tiles_of(150)
        x, acc, fired = normal(7, tokens, 40) * 9, normal(8, tokens, 40), fired_for(tokens, index, 0.6)
        placed = backend.place(acc)
        backend.ffn(placed, backend.place(x), backend.place(fired), layer.memory, layer.offsets(index), layer.bundle)
        assert near(backend.fetch(placed), layer.expected(acc, x, fired, index))

    # -- what must not matter

    @pytest.mark.parametrize("tokens", [1, 32])
    def test_threads_do_not_change_a_bit(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        results = []
        for threads in (1, 2, 3):
            backend = self.make(threads)
            results.append(everything(backend, tokens))
            backend.close()
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("codec", ["f16", "int8", "int4g64"])
    def test_rows_that_are_taken_out_together_have_the_same_bits(self, backend: Backend, codec: str) -> None:
        tokens, unit = 64, backend.together
        needed = np.random.default_rng(1).random(tokens // unit) < 0.4
        rows = np.flatnonzero(needed.repeat(unit))
        assert 0 < len(rows) < tokens
        layer, index = Layer(codec, 150, 96, gated=True, bias=True, decision=True), tiles_of(150)

        def run(x: Any, acc: Any) -> Any:
            gate = backend.zeros(x.shape[0], 150)
            backend.decide(gate, x, index, layer.memory, layer.offsets(index), layer.bundle)
            backend.ffn(acc, x, backend.fire(gate, "relu", index), layer.memory, layer.offsets(index), layer.bundle)
            return backend.fetch(acc)

        x, acc = backend.place(normal(1, tokens, 96)), backend.place(normal(2, tokens, 96))
        some = run(backend.take(x, rows), backend.take(acc, rows))
        assert same(some, run(x, acc)[rows])

    @pytest.mark.parametrize(("count", "size"), [(0, 8), (1, 1), (7, 512), (300, 4096)])
    def test_copy(self, backend: Backend, count: int, size: int) -> None:
        rng = np.random.default_rng(count)
        memory = rng.integers(0, 256, 2 * (count + 1) * size + 5, dtype=np.uint8)
        before, places = memory.copy(), rng.permutation(2 * count).astype(np.int64) * size + 3
        targets, sources = places[:count], places[count:]
        backend.copy(memory, targets, sources, size)
        for to, at in zip(targets, sources, strict=True):
            before[to : to + size] = before[at : at + size]
        assert (memory == before).all()

    def test_close_may_be_repeated(self) -> None:
        backend = self.make(2)
        backend.close()
        backend.close()


def everything(backend: Backend, tokens: int, codec: str | Codec = "f16", width: int = 280, seed: int = 1) -> list[Any]:
    """One result of every verb whose work may be split, large enough to be."""
    heads, dim = 4, width // 4
    x = backend.place(normal(seed, tokens, width))
    raw, _ = encoded(normal(seed + 1, 600, width), codec)
    gate = backend.zeros(tokens, 600)
    backend.linear(gate, 0, x, backend.matrix(raw.reshape(-1), codec, 600, width, keep=False))
    layer, index = Layer(codec, 600, width, gated=True, bias=True, decision=True), tiles_of(600)
    decided = backend.zeros(tokens, 600)
    backend.decide(decided, x, index, layer.memory, layer.offsets(index), layer.bundle)
    results = [gate, decided]
    for kind in ("relu", "silu"):
        fired = backend.fire(gate, kind, index)  # type: ignore[arg-type]
        acc = backend.zeros(tokens, width)
        backend.ffn(acc, x, fired, layer.memory, layer.offsets(index), layer.bundle)
        results += [fired, acc]
    kv = backend.new_kv(2, dim, 256, "f16")
    old = backend.place(normal(seed + 2, 208, 2 * dim))
    backend.append_kv(kv, 0, old, old, 0, 208)
    results += [backend.attend(x, kv, 176, heads), backend.norm(x, None, None, "layer", 1e-5)]
    return [backend.fetch(r) for r in results]
