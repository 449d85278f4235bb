"""Layouts: halves of bytes, offsets and their inverse; and the nearest entry of a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import CODECS, GROUPED
from flashinfer.quant.layout import packed, power_scales, unpacked
from flashinfer.quant.nearest import nearest


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.sampled_from([32, 64, 96])), elements=st.integers(0, 15)))
def test_column_i_and_column_i_plus_16_share_byte_i(codes):
    halves = packed(codes)
    assert halves.shape == (len(codes), codes.shape[1] // 2)
    for row in range(len(codes)):
        for byte, value in enumerate(halves[row]):
            column = byte // 16 * 32 + byte % 16
            assert (value & 15, value >> 4) == (codes[row, column], codes[row, column + 16])
    assert np.array_equal(unpacked(halves), codes)


@pytest.mark.parametrize("codec", GROUPED, ids=lambda c: c.name)
def test_codes_beyond_the_last_column_are_0(codec):
    columns, layout = 69, codec.layout
    encoded = codec.encode(np.linspace(-1, 2, columns, dtype=np.float32)[None])
    assert not layout.codes(encoded, layout.columns(columns))[:, columns:].any()


@given(st.sampled_from(GROUPED), st.integers(1, 20000))
def test_the_most_columns_of_a_row_of_so_many_bytes(codec, columns):
    layout = codec.layout
    most = layout.elements(layout.row_bytes(columns))
    assert columns <= most < columns + 32
    assert layout.row_bytes(most) == layout.row_bytes(columns) < layout.row_bytes(most + 1)


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [
        ("int8", 16, 16 + 3200),
        ("fp8", 16, 16 + 3200),
        ("dynamic8", 16, 16 + 3200),
        ("int4g32", 208, 208 + 1600),
        ("int4g64", 112, 112 + 1600),
        ("int4g128", 64, 64 + 1600),
        ("int4g32z", 400, 400 + 1600),
        ("int4g64z", 208, 208 + 1600),
        ("int4g128z", 112, 112 + 1600),
        ("int4g32iz", 304, 304 + 1600),
        ("int4g64iz", 160, 160 + 1600),
        ("int4g128iz", 80, 80 + 1600),
        ("q4_0", 208, 208 + 1600),
        ("nf4", 64, 64 + 1600),
        ("nf4f32", 208, 208 + 1600),
        ("mxfp4", 112, 112 + 1600),
    ],
)
def test_bytes_of_3200_columns(name, at, size):
    codec = next(c for c in GROUPED if c.name == name)
    assert (codec.layout.codes_at(3200), CODECS[name].row_bytes(3200)) == (at, size)


def test_all_powers_of_two():
    assert power_scales(np.arange(255, dtype=np.uint8)).tolist() == [2.0 ** (e - 127) for e in range(255)]


def test_the_nearest_entry_and_of_two_the_lower():
    table = np.array([-1, 0, 0.5, 2], np.float32)
    values = np.array([-9, -0.5, -0.49, 0.25, 0.26, 1.25, 1.2500001, 9], np.float32)
    assert nearest(values, table).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
