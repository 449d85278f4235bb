"""`dynamic8` and the dynamic map against bitsandbytes' golden bytes, and a plain search for the nearest."""

from __future__ import annotations

import numpy as np

from flashinfer.quant.dynamic import TABLE, encode_blocks
from flashinfer.quant.dynamic8 import DYNAMIC8
from tests.quant.make_golden import COLUMNS, GOLDEN
from tests.quant.samples import hard_rows, weights


def test_the_map_is_that_of_bitsandbytes():
    assert np.array_equal(TABLE, np.load(GOLDEN)["dynamic_map"])


def test_scales_and_codes_are_those_of_bitsandbytes():
    golden, encoded = np.load(GOLDEN), DYNAMIC8.encode(hard_rows(COLUMNS))
    assert np.array_equal(encoded[:, :8].copy().view("<f4"), golden["dynamic8_scales"])
    assert not encoded[:, 8:16].any()
    assert np.array_equal(encoded[:, 16:], golden["dynamic8_codes"])


def test_codes_are_the_nearest_but_for_the_even_steps():
    rows = weights(2, 300)
    largest, codes = encode_blocks(rows, 300)
    scaled = (rows / largest).astype(np.float64)
    distances = np.abs(scaled[:, :, None] - TABLE)
    chosen = np.take_along_axis(distances, codes[:, :, None].astype(np.int64), axis=2)[:, :, 0]
    assert (chosen <= distances.min(axis=2) + 2 / 65535).all()
    assert (codes == distances.argmin(axis=2)).mean() > 0.98


def test_a_block_of_zeros_is_zero_bytes():
    assert not DYNAMIC8.encode(np.zeros((1, 4100), np.float32)).any()
