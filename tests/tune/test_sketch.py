"""What a sketch says does not fire never fires, however the products are summed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.quant import codec_named
from flashinfer.tune.sketch import sketch_rows

F32 = npt.NDArray[np.float32]


def one_by_one(products: F32) -> F32:
    total = np.zeros(len(products), np.float32)
    for column in products.T:
        total = total + column
    return total


def in_lanes(products: F32) -> F32:
    """Sixteen partial sums, added up pairwise."""
    padded = np.zeros((len(products), -(-products.shape[1] // 16) * 16), np.float32)
    padded[:, : products.shape[1]] = products
    lanes = np.zeros((len(products), 16), np.float32)
    for block in padded.reshape(len(products), -1, 16).transpose(1, 0, 2):
        lanes = lanes + block
    while lanes.shape[1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    return lanes[:, 0]


def fused(rows: F32, x: F32) -> F32:
    """Products that are not rounded before they are added."""
    total = np.zeros(len(rows), np.float32)
    for column, value in zip(rows.T, x, strict=True):
        total = (total.astype(np.float64) + column.astype(np.float64) * float(value)).astype(np.float32)
    return total


def all_sums(rows: F32, x: F32) -> list[F32]:
    """The products of rows with x, `[rows]`, summed in float32 in several orders."""
    products = rows * x
    descending = np.sort(products, axis=1)[:, ::-1]
    return [
        one_by_one(products), one_by_one(products[:, ::-1]), one_by_one(descending), one_by_one(descending[:, ::-1]),
        in_lanes(products), products.sum(axis=1, dtype=np.float32), rows @ x, fused(rows, x),
    ]  # fmt: skip


def silent(product: F32, x: F32, slack: F32, bias: F32) -> npt.NDArray[np.bool_]:
    """Who is left out, by the letter of docs/format.md."""
    reach = slack.astype(np.float64) * np.sqrt(np.square(x, dtype=np.float64).sum())
    return (product.astype(np.float64) + bias + reach + 2.0**-110 <= 0) & (reach < 2.0**100)


def largest_bias(product: F32, x: F32, slack: F32) -> F32:
    """The bias at which a neuron is only just left out."""
    reach = slack.astype(np.float64) * np.sqrt(np.square(x, dtype=np.float64).sum())
    bias = -(product.astype(np.float64) + reach + 2.0**-110)
    rounded = bias.astype(np.float32)
    return np.where(rounded > bias, np.nextafter(rounded, np.float32(-np.inf)), rounded)


@st.composite
def rows_and_tokens(draw: st.DrawFn) -> tuple[F32, F32]:
    """Rows `[n, hidden]` and a token, of any scale; some tokens are the worst there is for the first row."""
    hidden = draw(st.sampled_from([1, 7, 32, 48, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = st.sampled_from([-148, -130, -60, -30, -10, 0, 0, 0, 10, 22, 60, 100])
    spread = draw(st.sampled_from([0, 0, 3, 20]))

    def drawn(*shape: int) -> npt.NDArray[np.float64]:
        values = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
        return values * 2.0 ** draw(exponents) * (rng.random(shape) < draw(st.sampled_from([1.0, 1.0, 0.3])))

    with np.errstate(all="ignore"):
        rows = np.clip(drawn(8, hidden), -1e38, 1e38).astype(np.float32)
        kind = draw(st.sampled_from(["any", "any", "error", "alternating", "row"]))
        x = drawn(hidden)
        if kind == "error":
            error = rows[0] - codec_named("int8g32").decode(sketch_rows(rows[:1])[0], hidden)[0].astype(np.float64)
            x = error / max(1e-300, np.abs(error).max()) * 2.0 ** draw(exponents)
        elif kind == "alternating":
            x = np.where(np.arange(hidden) % 2, 1.0, -1.0) * 2.0 ** draw(exponents)
        elif kind == "row":
            x = rows[0].astype(np.float64)
        return rows, np.clip(x, -1e38, 1e38).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(rows_and_tokens())
def test_the_bound_is_never_violated(made):
    rows, x = made
    encoded, slack = sketch_rows(rows)
    decoded = codec_named("int8g32").decode(encoded, rows.shape[1])
    with np.errstate(all="ignore"):
        for product in all_sums(decoded, x):
            bias = np.where(np.isfinite(product), largest_bias(product, x, slack), np.float32(-3e38))
            left_out = silent(product, x, slack, bias)
            for true in all_sums(rows, x):
                fires = true + bias > 0
                assert not (left_out & fires).any(), (rows, x, true, product, slack, bias)


def test_the_test_finds_a_slack_that_is_too_small():
    """Half the slack is violated: the bound is used to the full."""
    rows = np.random.default_rng(0).standard_normal((8, 48)).astype(np.float32)
    encoded, slack = sketch_rows(rows)
    decoded = codec_named("int8g32").decode(encoded, 48)
    x = rows[0] - decoded[0]
    product = one_by_one(decoded * x)
    bias = largest_bias(product, x, slack / 2)
    assert (silent(product, x, slack / 2, bias) & (one_by_one(rows * x) + bias > 0))[0]


def test_products_that_are_lost_below_the_smallest_number():
    """Each is rounded up to twice its size: only the absolute term covers that."""
    rows, x = np.full((1, 32), 1.02 * 2.0**-80, np.float32), np.full(32, 2.0**-70, np.float32)
    encoded, slack = sketch_rows(rows)
    product, true = (one_by_one(r * x) for r in (codec_named("int8g32").decode(encoded, 32), rows))
    bias = np.full(1, -17 * 2.0**-149, np.float32)
    assert slack * np.sqrt(np.square(x, dtype=np.float64).sum()) + product + bias <= 0 < true + bias
    assert not silent(product, x, slack, bias)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_may_fire(value):
    rows = np.ones((3, 32), np.float32)
    encoded, slack = sketch_rows(rows)
    x = np.full(32, -1, np.float32)
    x[5] = value
    with np.errstate(all="ignore"):
        product = codec_named("int8g32").decode(encoded, 32) @ x
        assert not silent(product, x, slack, np.zeros(3, np.float32)).any()


def test_slack_is_above_the_error_and_close_to_it():
    rows = np.random.default_rng(1).standard_normal((50, 4096)).astype(np.float32)
    encoded, slack = sketch_rows(rows)
    error = rows.astype(np.float64) - codec_named("int8g32").decode(encoded, 4096)
    norms = np.sqrt((error**2).sum(axis=1))
    lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    assert slack.dtype == np.float32
    assert (slack > norms).all()
    assert (slack < norms + 0.0011 * lengths).all()
    assert (slack < 0.01 * lengths).all()


def test_a_row_depends_on_itself_alone():
    rows = np.random.default_rng(2).standard_normal((9, 77)).astype(np.float32)
    together = sketch_rows(rows)
    for i in range(9):
        alone = sketch_rows(rows[i : i + 1])
        assert (alone[0][0] == together[0][i]).all()
        assert alone[1][0] == together[1][i]


def test_rows_of_zeros_and_rows_beyond_the_codec():
    rows = np.zeros((3, 40), np.float32)
    rows[1], rows[2, 3] = 1e-40, 3e38
    encoded, slack = sketch_rows(rows)
    assert not encoded[0].any()
    assert slack[0] == 0
    assert slack[1] > 1e-40 * np.sqrt(40)
    assert 2.9e38 < slack[2] < np.inf
