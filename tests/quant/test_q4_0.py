"""`q4_0` against gguf, byte for byte."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import codec_named
from tests.quant.samples import hard_rows, weights

CODEC = codec_named("q4_0")
FORMAT = GGMLQuantizationType.Q4_0
VALUES = st.one_of(
    st.floats(-60000, 60000, width=32), st.floats(-(2.0**-12), 2.0**-12, width=32), st.sampled_from([1, -1])
)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])), elements=VALUES, fill=VALUES)


def blocks_of(encoded: np.ndarray, columns: int) -> np.ndarray:
    """The same bytes in ggml's order: of each block its scale, then its codes."""
    count, at = columns // 32, CODEC.layout.codes_at(columns)
    scales = encoded[:, : 2 * count].reshape(len(encoded), count, 2)
    codes = encoded[:, at:].reshape(len(encoded), count, 16)
    return np.concatenate([scales, codes], axis=2).reshape(len(encoded), 18 * count)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_blocks_are_those_of_gguf(rows):
    rows[np.abs(rows) < 2.0**-120] = 0  # gguf divides by zero there
    ours = blocks_of(CODEC.encode(rows), rows.shape[1])
    assert np.array_equal(ours, quants.quantize(rows, FORMAT))


def test_whole_rows_are_those_of_gguf_and_decode_alike():
    for rows in (hard_rows(4096), weights(3, 3200)):
        encoded = CODEC.encode(rows)
        theirs = quants.quantize(rows, FORMAT)
        assert np.array_equal(blocks_of(encoded, rows.shape[1]), theirs)
        assert np.array_equal(CODEC.decode(encoded, rows.shape[1]), quants.dequantize(theirs, FORMAT))


def test_of_two_as_large_the_first_has_the_sign():
    rows = np.zeros((2, 64), np.float32)
    rows[0, [3, 5]], rows[1, [40, 50]] = [1, -1], [-2, 2]
    scales = CODEC.layout.scales(CODEC.encode(rows), 64)
    assert scales.tolist() == [[-0.125, 0], [0, 0.25]]
