"""The int8g32 codec against a twin in exact fractions, block by block."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import codec_named, int8g32

CODEC = codec_named("int8g32")
LARGEST = 127.0 * 65504.0
VALUES = st.one_of(
    st.floats(-LARGEST, LARGEST, width=32),
    st.floats(-(2.0**-16), 2.0**-16, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),  # subnormal
    st.just(0.0),
)
ROWS = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70).flatmap(
    lambda shape: hnp.arrays(np.float32, (min(shape[0], 4), shape[1]), elements=VALUES, fill=VALUES)
)


def exact_block(values: list[Fraction]) -> tuple[np.float16, list[int]]:
    """Scale and integers of one block, as its definition says."""
    most = max(abs(v) for v in values)
    scale = np.float16(float(most / 127))
    while Fraction(float(scale)) * 127 < most:
        scale = np.nextafter(scale, np.float16(np.inf))
    while scale > 0 and Fraction(float(np.nextafter(scale, np.float16(0)))) * 127 >= most:
        scale = np.nextafter(scale, np.float16(0))
    return scale, [round(v / Fraction(float(scale))) if scale else 0 for v in values]


def exact_row(row: np.ndarray) -> bytes:
    scales, integers = b"", b""
    for start in range(0, len(row), 32):
        block = [Fraction(float(v)) for v in row[start : start + 32]]
        scale, some = exact_block(block)
        scales += scale.astype("<f2").tobytes()
        integers += np.array(some + [0] * (32 - len(some)), np.int8).tobytes()
    return scales + integers


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_bytes_are_those_of_the_definition(rows):
    encoded = CODEC.encode(rows)
    assert encoded.shape == (len(rows), 34 * -(-rows.shape[1] // 32))
    assert [row.tobytes() for row in encoded] == [exact_row(row) for row in rows]


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_the_error_is_at_most_half_a_scale(rows):
    encoded = CODEC.encode(rows)
    blocks = -(-rows.shape[1] // 32)
    scales = encoded[:, : 2 * blocks].copy().view("<f2").astype(np.float64)
    error = np.abs(CODEC.decode(encoded, rows.shape[1]).astype(np.float64) - rows)
    assert (error <= np.repeat(scales, 32, axis=1)[:, : rows.shape[1]] / 2).all()
    assert (encoded[:, 2 * blocks :].view(np.int8) >= -127).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, (3, 68)))
def test_decoding_is_exact_whatever_the_bytes(data):
    scales = data[:, :4].copy().view("<f2")
    scales[~np.isfinite(scales)] = 1
    data[:, :4] = scales.view(np.uint8)
    integers = data[:, 4:].view(np.int8).astype(np.float64)
    exact = integers * np.repeat(scales.astype(np.float64), 32, axis=1)
    assert np.array_equal(CODEC.decode(data).astype(np.float64), exact)


def test_a_zero_block_is_zero_bytes():
    rows = np.zeros((2, 80), np.float32)
    rows[1, 40], rows[0, :40] = 1, -0.0
    encoded = CODEC.encode(rows)
    assert not encoded[0].any()
    assert not encoded[1, :2].any()
    assert not encoded[1, 4:6].any()
    assert np.array_equal(CODEC.decode(encoded, 80) != 0, rows != 0)


@pytest.mark.parametrize("value", [np.nextafter(np.float32(LARGEST), np.float32(np.inf)), 3e38, np.inf, np.nan])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_no_scale_reaches_is_an_error(value, sign):
    with pytest.raises(OverflowError, match="int8g32"):
        CODEC.encode(np.array([[1.0] * 40, [1.0] * 39 + [sign * value]], np.float32))


def test_the_largest_and_the_smallest_scale():
    rows = np.array([[LARGEST, -LARGEST, 65504, 30000], [2.0**-24, 127 * 2.0**-24, 2.0**-25, 1e-45]], np.float32)
    expected = [[LARGEST, -LARGEST, 65504, 0], [2.0**-24, 127 * 2.0**-24, 0, 0]]
    assert CODEC.decode(CODEC.encode(rows), 4).tolist() == expected


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_the_pieces_it_works_in_do_not_show(piece, monkeypatch):
    rows = np.random.default_rng(1).standard_normal((37, 45)).astype(np.float32)
    expected = [CODEC.encode(row[None])[0] for row in rows]
    monkeypatch.setattr(int8g32, "_PIECE", piece)
    assert np.array_equal(CODEC.encode(rows), expected)
