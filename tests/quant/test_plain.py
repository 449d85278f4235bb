"""The unquantised codecs, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import bf16_to_f32, codec_named, f32_to_bf16


@pytest.mark.parametrize(("name", "value"), [("f16", 65536.0), ("f16", -1e9), ("bf16", 3.4e38), ("bf16", -3.4e38)])
def test_overflow_is_an_error(name, value):
    with pytest.raises(OverflowError, match=name):
        codec_named(name).encode(np.array([[1.0, value]], np.float32))


def test_every_half_and_bfloat_survives():
    import torch

    bits = np.arange(65536, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    expected = torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert (bf16_to_f32(finite) == expected).all()
    assert (f32_to_bf16(expected) == finite).all()
    halves = bits[(bits & 0x7C00) != 0x7C00].view(np.uint8).reshape(1, -1)
    assert (codec_named("f16").encode(codec_named("f16").decode(halves)) == halves).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
def test_bf16_rounds_as_torch_does(bits):
    import torch

    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    ours = f32_to_bf16(values)
    nan = np.isnan(values)
    assert (ours[~nan] == expected[~nan]).all()
    assert np.isnan(bf16_to_f32(ours[nan])).all()
