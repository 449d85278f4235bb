"""Rounding with the errors propagated, beside the algorithm as the paper has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.quant import GROUPED, codec_named
from flashinfer.tune import gptq
from flashinfer.tune.gptq import Columns, Rows, damp, factorise, falling, round_rows

F64 = npt.NDArray[np.float64]


def inputs(tokens: int, width: int, seed: int = 0) -> F64:
    """Correlated inputs `[tokens, width]`, some columns much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, width)) @ (np.eye(width) + 0.3 * rng.normal(size=(width, width)))
    return mixed * np.exp(rng.normal(size=width))


def paper(m: F64, h: F64, rounded: Callable[[int, F64], F64]) -> F64:
    """Algorithm 1 of arXiv 2210.17323, a column at a time: the Cholesky factor of the inverse, upper. What the rows of
    `m` `[inputs, outputs]` become."""
    m, out = m.copy(), np.empty_like(m)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for k in range(len(m)):
        out[k] = rounded(k, m[k])
        m[k + 1 :] -= np.outer(u[k, k + 1 :], (m[k] - out[k]) / u[k, k])
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1, 7, 16, 128]), st.integers(0, 1000))
def test_it_is_the_algorithm_of_the_paper(width: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h: Any = inputs(4 * width, width, seed).T @ inputs(4 * width, width, seed)
    damp(h)
    m: Any = rng.normal(size=(width, 5))
    expected = paper(m, h, lambda _, wanted: np.rint(wanted * 3) / 3)
    errors = m.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "BLOCK", block)
        patch.setattr(gptq, "_STRIP", block)
        round_rows(errors, factorise(h.copy()), lambda _, wanted: np.rint(wanted * 3) / 3)
    np.testing.assert_allclose(m - errors, expected, atol=1e-9)


@pytest.mark.parametrize("strip", [1, 5, 8, 64])
def test_the_factor(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_STRIP", strip)
    h: Any = inputs(100, 24).T @ inputs(100, 24)
    u = np.triu(factorise(h.copy()))
    assert np.allclose(np.diagonal(u), 1)
    lower = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(u * np.diagonal(lower), lower, atol=1e-9 * np.abs(lower).max())


def test_what_is_singular_is_said() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        factorise(np.zeros((4, 4), dtype=np.float32))


def test_damping() -> None:
    h = np.diag([1.0, 3.0, 0.0, 4.0]).astype(np.float32)
    damp(h)
    assert np.diagonal(h) == pytest.approx([1.02, 3.02, 0.02, 4.02])


def test_the_order() -> None:
    assert falling(np.diag([1.0, 5.0, 3.0, 5.0]).astype(np.float32)).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("codec", [c.name for c in GROUPED])
@pytest.mark.parametrize("neurons", [False, True])
def test_less_is_lost_than_by_rounding_each(codec: str, neurons: bool) -> None:
    """Measured where it counts: on the products. neurons: groups along the outputs, as of down."""
    x = inputs(200, 80).astype(np.float32)
    m = np.random.default_rng(1).standard_normal((80, 40)).astype(np.float32)
    found, plain = rounded_by(codec, m, x, neurons), nearest(codec, m, neurons)
    ours, theirs = (float(np.square(x @ (m - q)).sum()) for q in (found, plain))
    assert ours < 0.8 * theirs


def rounded_by(codec: str, m: npt.NDArray[np.float32], x: npt.NDArray[np.float32], neurons: bool) -> Any:
    kind, h = codec_named(codec), x.T @ x
    order = falling(h)
    h = h[np.ix_(order, order)]
    damp(h)
    rounding: Any = Rows(kind, m) if neurons else Columns(kind, np.ascontiguousarray(m.T))  # type: ignore[arg-type]
    errors = m[order]
    round_rows(errors, factorise(h), lambda k, wanted: rounding.rounded(int(order[k]), wanted))
    q = decoded(codec, rounding.encoded(), m, neurons)
    np.testing.assert_allclose(m[order] - errors, q[order], atol=1e-5)  # what was propagated is what is stored
    return q


def nearest(codec: str, m: npt.NDArray[np.float32], neurons: bool) -> Any:
    rows = m if neurons else np.ascontiguousarray(m.T)
    return decoded(codec, codec_named(codec).encode(rows), m, neurons)


def decoded(codec: str, data: npt.NDArray[np.uint8], m: npt.NDArray[np.float32], neurons: bool) -> Any:
    return codec_named(codec).decode(data, m.shape[1]) if neurons else codec_named(codec).decode(data, m.shape[0]).T


@pytest.mark.parametrize("codec", [c.name for c in GROUPED])
def test_columns_that_do_not_depend_on_each_other_are_rounded_to_nearest(codec: str) -> None:
    """Scales stay those of the matrix, and with an H without correlations nothing is propagated."""
    m = np.random.default_rng(2).standard_normal((100, 8)).astype(np.float32)
    m[:, 3] = 0
    rounding: Any = Columns(codec_named(codec), np.ascontiguousarray(m.T))  # type: ignore[arg-type]
    errors = m.copy()
    round_rows(errors, np.eye(100, dtype=np.float32), rounding.rounded)
    found, plain = decoded(codec, rounding.encoded(), m, False), nearest(codec, m, False)
    assert (np.abs(m - found) <= np.abs(m - plain) + 1e-6).all()
    layout: Any = codec_named(codec).layout  # type: ignore[attr-defined]
    before = codec_named(codec).encode(np.ascontiguousarray(m.T))
    at = layout.codes_at(100)
    assert np.array_equal(rounding.encoded()[:, :at], before[:, :at])
