"""`mxfp4` against gguf, byte for byte, and where gguf's logarithm is not exact against the specification."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import codec_named
from tests.quant.samples import hard_rows, weights

CODEC = codec_named("mxfp4")
FORMAT = GGMLQuantizationType.MXFP4
VALUES = st.one_of(st.floats(-60000, 60000, width=16), st.floats(-1, 1, width=16), st.sampled_from([0, 0.25, 5, -7]))
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])), elements=VALUES, fill=VALUES)


def blocks_of(encoded: np.ndarray, columns: int) -> np.ndarray:
    """The same bytes in ggml's order: of each block its scale, then its codes."""
    count, at = columns // 32, CODEC.layout.codes_at(columns)
    codes = encoded[:, at:].reshape(len(encoded), count, 16)
    return np.concatenate([encoded[:, :count, None], codes], axis=2).reshape(len(encoded), 17 * count)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_blocks_are_those_of_gguf(rows):
    assert np.array_equal(blocks_of(CODEC.encode(rows), rows.shape[1]), quants.quantize(rows, FORMAT))


def test_whole_rows_are_those_of_gguf_and_decode_alike():
    for rows in (hard_rows(4096), weights(3, 3200)):
        encoded = CODEC.encode(rows)
        theirs = quants.quantize(rows, FORMAT)
        assert np.array_equal(blocks_of(encoded, rows.shape[1]), theirs)
        assert np.array_equal(CODEC.decode(encoded, rows.shape[1]), quants.dequantize(theirs, FORMAT))


@pytest.mark.parametrize("shift", [0, 16])
def test_every_f16_and_bf16_scales_as_in_gguf(shift):
    """All normal ones as the largest of a block: what the docstring claims of gguf's logarithm."""
    bits = np.arange(1, 0x7C00, dtype=np.uint16) if shift == 0 else np.arange(0x0180, 0x7F80, dtype=np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32) if shift == 0 else (bits.astype(np.uint32) << shift).view(np.float32)
    )
    exact = np.frexp(values)[1] - 3 + 127
    with np.errstate(all="ignore"):
        theirs = np.floor(np.log2(values)) - 2 + 127
    assert np.array_equal(exact, theirs)
    rows = np.repeat(values[::97, None], 32, axis=1)
    assert np.array_equal(CODEC.encode(rows)[:, 0], exact[::97])


def test_just_below_a_power_of_two_the_scale_is_that_of_the_specification():
    row = np.full((1, 32), np.nextafter(np.float32(2**20), np.float32(0)))
    assert CODEC.layout.scales(CODEC.encode(row), 32).tolist() == [[2.0 ** (19 - 2)]]


@pytest.mark.parametrize(
    ("value", "code"), [(0.25, 0), (0.75, 1), (2.5, 4), (-0.25, 0), (-0.2500001, 9), (-5, 14), (7.9, 7)]
)
def test_rounding(value, code):
    row = np.zeros((1, 32), np.float32)
    row[0, :2] = [value, 4.5]
    assert CODEC.layout.codes(CODEC.encode(row), 2)[0, 0] == code
