"""The small verbs in Triton against their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backend.on_triton import fused, runs, twin  # isort: skip  (skips without Triton)

from flashinfer.backend import triton_vectors
from tests.backend.backend_conformance import near, normal, same
from tests.backend.reference import normed

__all__ = ["fused", "twin"]
pytestmark = runs


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("given", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("width", "size"), [(1, 1), (50, None), (2500, None), (60, 20)])
def test_norm(fused, kind: Any, given: tuple[bool, bool], width: int, size: int | None) -> None:
    """Of whole rows, more than a program takes at once among them, and of their parts."""
    x, parts = normal(6, 3, width) * 5 + 2, width // (size or width)
    weight, bias = (normal(i, size or width) if given[i] and (i == 0 or kind == "layer") else None for i in (0, 1))
    vectors = [None if v is None else fused.vector(v) for v in (weight, bias)]
    found = fused.fetch(fused.norm(fused.place(x), *vectors, kind, 1e-5, size))
    expected = [normed(part, weight, bias, kind, 1e-5) for part in np.split(x, parts, axis=1)]
    assert near(found, np.concatenate(expected, axis=1))


def test_a_row_is_normed_alone(fused) -> None:
    x = normal(1, 16, 300)
    x[3, 7] = np.nan
    every = fused.fetch(fused.norm(fused.place(x), None, None, "layer", 1e-5))
    one = fused.fetch(fused.norm(fused.place(x[5:6]), None, None, "layer", 1e-5))
    assert same(every[5:6], one)
    assert np.isfinite(every).all(axis=1).tolist() == [row != 3 for row in range(16)]


@pytest.mark.parametrize(("dim", "half"), [(8, 4), (20, 6), (64, 32), (6, 3), (10, 0)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_rotate_has_the_twins_bits(fused, twin, dim: int, half: int, tokens: int) -> None:
    x, angle = normal(1, tokens, 3 * dim), np.random.default_rng(2).random((tokens + 5, half))
    tables = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    before = x.copy()
    found, expected = (b.fetch(b.rotate(b.place(x), dim, *map(b.vector, tables), 5)) for b in (fused, twin))
    assert same(found, expected)
    assert same(x, before)


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(2, 16, 16), (3, 7, 33), (1, 40, 24)])
def test_what_is_appended_is_the_twins(fused, twin, dtype: Any, heads: int, dim: int, value_dim: int) -> None:
    """Across tiles of keys, of rows some, and nothing else is written."""
    kept = []
    for backend in (fused, twin):
        k, v = (backend.place(normal(i, 48, heads * size) * 1e3) for i, size in ((1, dim), (2, value_dim)))
        kv = backend.new_kv(heads, dim, 150, dtype, value_dim)
        backend.append_kv(kv, 112, k, v, 5, 35)
        backend.append_kv(kv, 3, k, v, 0, 1)
        backend.append_kv(kv, 149, k, v, 47, 1)
        kept.append([x.cpu().numpy() for x in (kv.k, kv.v)])
    for found, expected in zip(*kept, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_is_too_large_for_the_cache_is_infinite(fused) -> None:
    x = np.array([[65519.0, 65520.0, -1e30, np.nan, 1e-8, 2.0**-24, 1 + 2.0**-11, 1 + 3 * 2.0**-11]], np.float32)
    kv = fused.new_kv(1, 8, 16, "f16")
    fused.append_kv(kv, 0, fused.place(x), fused.place(x), 0, 1)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(fused.fetch_kv(kv, 1)[0], expected, equal_nan=True)


def test_the_probe_finds_a_wrong_row(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_vectors.probe(fused._device)
    monkeypatch.setattr(triton_vectors, "fused_rotate", lambda x, *_: x)
    with pytest.raises(RuntimeError, match="turned"):
        triton_vectors.probe(fused._device)
