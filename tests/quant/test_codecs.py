from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.errors import StoreError
from flashinfer.quant import CODECS, Codec, bf16_to_f32, codec_named, f32_to_bf16

MODERATE = st.floats(-60000, 60000, width=32)
RELATIVE_ERROR = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.0}
SHARED_ERROR = {"f32": 0.0, "f16": 0.0, "bf16": 0.0, "int8": (1 + 2.0**-10) / 254}
"""Relative to the largest value of a row."""
SMALLEST_STEP = {"f32": 0.0, "f16": 2.0**-24, "bf16": 2.0**-133, "int8": 2.0**-25}
INFINITE = ["bf16", "f16", "f32"]
"""Codecs that know infinity."""


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


class TestConformance:
    """What every codec must do; a new one is tested by being in the table."""

    def test_table_name_is_its_own(self, codec):
        assert CODECS[codec.name] is codec

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_round_trip_within_precision(self, data):
        codec = codec_named(data.draw(st.sampled_from(sorted(CODECS))))
        shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9)))
        rows = data.draw(hnp.arrays(np.float32, shape, elements=MODERATE))
        back = codec.decode(codec.encode(rows), shape[1])
        assert back.dtype == np.float32
        assert back.shape == rows.shape
        error = np.abs(back.astype(np.float64) - rows)
        largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
        relative = RELATIVE_ERROR[codec.name] * np.abs(rows) + SHARED_ERROR[codec.name] * largest
        assert (error <= relative + SMALLEST_STEP[codec.name]).all()

    def test_without_a_number_of_elements_all_bytes_are_decoded(self, codec):
        rows = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
        encoded = codec.encode(rows)
        assert np.array_equal(codec.decode(encoded), codec.decode(encoded, 64))
        assert np.array_equal(codec.decode(encoded)[:, :37], codec.decode(encoded, 37))

    def test_no_rows(self, codec):
        encoded = codec.encode(np.zeros((0, 40), np.float32))
        assert encoded.shape == (0, codec.row_bytes(40))
        assert codec.decode(encoded, 40).shape == (0, 40)

    def test_encoded_shape_is_row_bytes(self, codec):
        encoded = codec.encode(np.ones((3, 7), np.float32))
        assert encoded.dtype == np.uint8
        assert encoded.shape == (3, codec.row_bytes(7))

    def test_a_row_depends_on_itself_alone(self, codec):
        rows = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
        together = codec.encode(rows)
        for i in range(6):
            assert (codec.encode(rows[i : i + 1])[0] == together[i]).all()

    def test_encoding_what_was_decoded_changes_nothing(self, codec):
        encoded = codec.encode(np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32))
        assert (codec.encode(codec.decode(encoded)) == encoded).all()

    def test_strided_input(self, codec):
        rows = np.random.default_rng(2).standard_normal((8, 12)).astype(np.float32)
        assert (codec.encode(rows[::2, ::3]) == codec.encode(rows[::2, ::3].copy())).all()

    @pytest.mark.parametrize("name", INFINITE)
    def test_infinity_is_kept(self, name):
        codec = codec_named(name)
        rows = np.array([[np.inf, -np.inf, 1.0]], np.float32)
        assert (codec.decode(codec.encode(rows)) == rows).all()


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


def test_unknown_codec():
    with pytest.raises(StoreError, match=r"int3.*f32, f16, bf16, int8"):
        codec_named("int3")
