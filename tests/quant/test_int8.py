"""`int8` and `llm.int8` against bitsandbytes' golden bytes and their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer.quant import CODECS, LlmInt8
from flashinfer.quant.int8 import INT8
from tests.quant.make_golden import COLUMNS, GOLDEN
from tests.quant.samples import OUTLIERS, hard_rows, weights


def test_scales_and_integers_are_those_of_bitsandbytes():
    golden, encoded = np.load(GOLDEN), INT8.encode(hard_rows(COLUMNS))
    assert np.array_equal(encoded[:, :4].copy().view("<f4")[:, 0], golden["int8_scales"])
    assert not encoded[:, 4:16].any()
    assert np.array_equal(encoded[:, 16:].view(np.int8), golden["int8_codes"])


def test_a_value_is_an_integer_times_a_127th_of_the_scale():
    rows = weights(3, 100)
    integers = INT8.encode(rows)[:, 16:116].view(np.int8).astype(np.float32)
    scales = np.abs(rows).max(axis=1, keepdims=True) * np.float32(1 / 127)
    assert np.array_equal(INT8.decode(INT8.encode(rows), 100), integers * scales)


def test_without_outliers_it_has_the_integers_of_bitsandbytes():
    golden, encoded = np.load(GOLDEN), LlmInt8(OUTLIERS).encode(hard_rows(COLUMNS))
    assert np.array_equal(encoded[:, :4].copy().view("<f4")[:, 0], golden["llm_scales"])
    assert np.array_equal(encoded[:, 16 : 16 + COLUMNS].view(np.int8), golden["llm_codes"])
    assert not golden["llm_codes"][:, OUTLIERS].any()


def test_outliers_are_their_float16():
    rows = hard_rows(COLUMNS)
    rows[:, OUTLIERS] *= 100
    codec = LlmInt8(OUTLIERS)
    decoded = codec.decode(codec.encode(rows), COLUMNS)
    assert np.array_equal(decoded[:, OUTLIERS], rows[:, OUTLIERS].astype(np.float16).astype(np.float32))
    others = np.delete(rows, OUTLIERS, axis=1)
    assert np.array_equal(np.delete(decoded, OUTLIERS, axis=1), INT8.decode(INT8.encode(others), others.shape[1]))


def test_a_row_with_no_outliers_is_one_of_int8():
    assert np.array_equal(LlmInt8(()).encode(weights(2, 70)), CODECS["int8"].encode(weights(2, 70)))


@pytest.mark.parametrize("outliers", [(1, 1), (2, 1), (-1, 3)])
def test_outliers_are_ascending(outliers):
    with pytest.raises(ValueError, match="ascending"):
        LlmInt8(outliers)
