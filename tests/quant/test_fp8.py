"""`fp8` against torch's float8_e4m3fn."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant.fp8 import FP8, e4m3_encode, e4m3_values
from tests.quant.samples import hard_rows


def test_all_codes_have_the_values_of_torch():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3_values(), theirs, equal_nan=True)
    assert np.array_equal(np.signbit(e4m3_values()[:255]), np.arange(255) >= 128)


def test_every_value_and_every_middle_and_their_neighbours_round_as_in_torch():
    values = np.sort(e4m3_values()[:127])
    middles = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, middles])
    near = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(448))])
    both = np.concatenate([near, -near])
    assert np.array_equal(e4m3_encode(both), torch.from_numpy(both).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, 50, elements=st.floats(-448, 448, width=32)))
def test_values_round_as_in_torch(values):
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(e4m3_encode(values), theirs)


def test_rows_are_what_torch_gives():
    rows = hard_rows(4096)
    scales = torch.from_numpy(np.abs(rows).max(axis=1, keepdims=True)) / 448
    codes = (torch.from_numpy(rows) / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    encoded = FP8.encode(rows)
    assert np.array_equal(encoded[:, :4].copy().view("<f4"), scales.numpy())
    assert np.array_equal(encoded[:, 16:], codes.view(torch.uint8).numpy())
    assert np.array_equal(FP8.decode(encoded), (codes.float() * scales).numpy())
