"""Attention in Triton against the plain twin, and what must not change its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backend.on_triton import fused, larger_programs, runs  # isort: skip  (skips without Triton)

from flashinfer.backend import Scoring, triton_attend
from flashinfer.backend.base import PLAIN
from tests.backend.backend_conformance import SCORINGS, near, normal, rounded, same
from tests.backend.reference import attended

__all__ = ["fused", "larger_programs"]
pytestmark = [runs, pytest.mark.usefixtures("larger_programs")]
POSITIONS = 208


class Keys:
    """Keys and values of some heads, in a backend's cache and as it keeps them."""

    def __init__(
        self, backend: Any, heads: int, dim: int, value_dim: int | None = None, dtype: Any = "f32",
        capacity: int = POSITIONS, count: int = POSITIONS, spoilt: int = 0,
    ) -> None:  # fmt: skip
        sizes = (dim, value_dim or dim)
        self.k, self.v = (normal(i, POSITIONS, heads * size) for i, size in enumerate(sizes))
        self.k[:spoilt], self.v[:spoilt] = np.nan, np.nan
        self.kv = backend.new_kv(heads, dim, capacity, dtype, value_dim)
        backend.append_kv(self.kv, 0, backend.place(self.k), backend.place(self.v), 0, count)
        if not spoilt:
            self.k, self.v = (rounded(x, dtype, size) for x, size in zip((self.k, self.v), sizes, strict=True))


def attend(backend: Any, keys: Keys, q: Any, first: int, heads: int, scoring: Scoring = PLAIN) -> Any:
    return backend.fetch(backend.attend(backend.place(q), keys.kv, first, heads, scoring))


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(2, 2, 16, 16), (3, 1, 20, 33), (4, 2, 40, 24), (1, 1, 7, 70)],
)
def test_attention(fused, dtype: Any, heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    keys = Keys(fused, kv_heads, dim, value_dim, dtype)
    for first, tokens in ((0, 1), (131, 1), (112, 32)):
        q = normal(5, tokens, heads * dim)
        assert near(attend(fused, keys, q, first, heads), attended(q, keys.k, keys.v, first, heads))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (1, 1)])
def test_scoring(fused, scoring: str, heads: int, kv_heads: int) -> None:
    keys, some = Keys(fused, kv_heads, 20), SCORINGS[scoring](heads)
    for first, tokens in ((5, 1), (64, 1), (207, 1), (128, 16)):
        q = normal(6, tokens, heads * 20) * 3
        assert near(attend(fused, keys, q, first, heads, some), attended(q, keys.k, keys.v, first, heads, some))


@pytest.mark.parametrize("dtype", ["f16", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (2, 2)])
def test_with_the_cuts_that_a_card_gets(
    fused, dtype: Any, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    keys = Keys(fused, kv_heads, 40, 24, dtype)
    for first, tokens in ((150, 1), (0, 16)):
        q = normal(5, tokens, heads * 40)
        assert near(attend(fused, keys, q, first, heads), attended(q, keys.k, keys.v, first, heads))


@pytest.mark.parametrize("scoring", ["plain", "all"])
def test_neither_chunks_nor_capacity_nor_later_keys_change_a_bit(
    fused, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, dim = PLAIN if scoring == "plain" else SCORINGS["all"](1), 24
    q, keys = normal(5, 48, dim), Keys(fused, 1, dim)
    whole = attend(fused, keys, q, 96, 1, some)
    pieces = [attend(fused, keys, q[at : at + 16], 96 + at, 1, some) for at in (0, 16, 32)]
    assert same(np.concatenate(pieces), whole)
    monkeypatch.setattr(triton_attend, "PARTIAL", 1)
    assert same(attend(fused, keys, q, 96, 1, some), whole)
    roomy, short = Keys(fused, 1, dim, capacity=700), Keys(fused, 1, dim, count=144)
    assert same(attend(fused, roomy, q, 96, 1, some), whole)
    assert same(attend(fused, short, q, 96, 1, some), whole)
    one = attend(fused, keys, q[47:], 143, 1, some)
    assert same(attend(fused, roomy, q[47:], 143, 1, some), one)
    assert same(attend(fused, short, q[47:], 143, 1, some), one)


@pytest.mark.parametrize(("first", "tokens"), [(192, 1), (192, 16)])
def test_what_lies_beyond_the_window_is_not_looked_at(fused, first: int, tokens: int) -> None:
    """Whole tiles of keys, which may be no numbers."""
    some, q = Scoring(window=60), normal(5, tokens, 32)
    fine, spoilt = (attend(fused, Keys(fused, 2, 16, spoilt=n), q, first, 2, some) for n in (0, 128))
    assert np.isfinite(fine).all()
    assert same(fine, spoilt)


def test_many_tiles_are_combined_in_parts(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of them at once, near the same."""
    keys, q = Keys(fused, 1, 16), normal(5, 1, 16)
    monkeypatch.setattr(triton_attend, "TILES", 1)
    assert near(attend(fused, keys, q, 207, 1), attended(q, keys.k, keys.v, 207, 1))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
def test_a_row_that_is_not_finite_stays_alone(fused) -> None:
    q = normal(5, 16, 32)
    q[3, 5], q[9, 17] = np.nan, np.inf
    found = np.isfinite(attend(fused, Keys(fused, 2, 16), q, 128, 2)).reshape(16, 2, 16).all(axis=2)
    expected = np.ones((16, 2), bool)
    expected[3, 0] = expected[9, 1] = False
    assert (found == expected).all()
