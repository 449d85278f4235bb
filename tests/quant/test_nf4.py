"""`nf4` against bitsandbytes' golden bytes, and its nested scales against a plain loop."""

from __future__ import annotations

import numpy as np

from flashinfer.quant.dynamic import TABLE, encode_blocks
from flashinfer.quant.nested import nested_bytes, nested_encode, nested_scales
from flashinfer.quant.nf4 import NF4, NF4F32
from flashinfer.quant.nf4 import TABLE as NORMAL
from tests.quant.make_golden import COLUMNS, GOLDEN
from tests.quant.samples import hard_rows, weights


def test_codes_are_those_of_bitsandbytes():
    """Which has the first of two columns in the high half of a byte."""
    theirs = np.load(GOLDEN)["nf4_codes"]
    codes = np.stack([theirs >> 4, theirs & 15], axis=2).reshape(3, COLUMNS)
    assert np.array_equal(NF4.layout.codes(NF4.encode(hard_rows(COLUMNS)), COLUMNS), codes)


def test_scales_are_those_of_bitsandbytes():
    """Codes to the byte. It sums the mean in float32, in an order of its own: that, and what is left, to a few bits."""
    golden, encoded = np.load(GOLDEN), NF4.encode(hard_rows(COLUMNS))
    floats = encoded[:, :8].copy().view("<f4")
    assert np.array_equal(encoded[:, 8:72], golden["nf4_scales"])
    np.testing.assert_allclose(floats[:, 0], golden["nf4_mean"], rtol=2.0**-22)
    np.testing.assert_allclose(floats[:, 1], golden["nf4_largest"][:, 0], rtol=2.0**-20)
    assert not encoded[:, 72:80].any()


def test_a_value_is_an_entry_times_its_scale():
    rows = weights(2, 200)
    encoded = NF4.encode(rows)
    scales = np.repeat(nested_scales(encoded[:, : nested_bytes(4)]), 64, axis=1)[:, :200]
    assert np.array_equal(NF4.decode(encoded, 200), NORMAL[NF4.layout.codes(encoded, 200)] * scales)


def test_scales_in_float32_are_the_largest_of_their_blocks():
    """And the codes are those of nf4, which are chosen before the scales are quantised."""
    rows = hard_rows(COLUMNS)
    encoded = NF4F32.encode(rows)
    largest = np.abs(rows).reshape(len(rows), -1, 64).max(axis=2)
    assert np.array_equal(NF4F32.layout.scales(encoded, COLUMNS), largest)
    codes = NF4F32.layout.codes(encoded, COLUMNS)
    assert np.array_equal(codes, NF4.layout.codes(NF4.encode(rows), COLUMNS))
    assert np.array_equal(NF4F32.decode(encoded), NORMAL[codes] * np.repeat(largest, 64, axis=1))


def test_nested_scales_one_by_one():
    scales = np.abs(weights(2, 600))
    raw = nested_encode(scales)
    assert raw.shape == (2, nested_bytes(600)) == (2, 4 + 4 * 3 + 600)
    for row, stored, read in zip(scales, raw, nested_scales(raw), strict=True):
        mean = np.float32(row.astype(np.float64).mean())
        floats, codes = stored[:16].view("<f4"), stored[16:]
        assert floats[0] == mean
        for i in range(600):
            block = (row - mean)[i // 256 * 256 : i // 256 * 256 + 256]
            assert floats[1 + i // 256] == np.abs(block).max()
            assert read[i] == TABLE[codes[i]] * floats[1 + i // 256] + mean
        assert np.array_equal(encode_blocks((row - mean)[None], 256)[1][0], codes)


def test_scales_that_are_all_equal_are_exact():
    raw = nested_encode(np.full((1, 300), 0.3, np.float32))
    assert np.array_equal(nested_scales(raw), np.full((1, 300), 0.3, np.float32))
