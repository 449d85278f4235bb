"""Every codec of the table, and `llm.int8` with some outliers, held to the conformance suite; and the table itself."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer.errors import StoreError
from flashinfer.quant import CODECS, GROUPED, Codec, LlmInt8, codec_named, user_codec
from tests.quant.codec_conformance import CodecConformance
from tests.quant.samples import weights


class TestTable(CodecConformance):
    @pytest.fixture(params=sorted(CODECS))
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        return codec_named(request.param)


class TestLlmInt8(CodecConformance):
    @pytest.fixture(params=[(), (0, 3), (1, 2, 4, 7, 8, 11, 12, 13, 14)], ids=len)
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        return LlmInt8(request.param)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "int8g32", "q4_0", "mxfp4"])
def test_encoding_what_was_decoded_changes_nothing(name):
    """Of these the largest of a group is a value they have."""
    codec = codec_named(name)
    encoded = codec.encode(weights(4, 200))
    assert np.array_equal(codec.encode(codec.decode(encoded, 200)), encoded)


def test_names_are_their_own():
    assert all(CODECS[name].name == name for name in CODECS)


@pytest.mark.parametrize("codec", GROUPED, ids=lambda c: c.name)
def test_a_layout_says_all_that_a_kernel_needs(codec):
    """The plain twin: one row, one column after the other, from the layout's fields alone."""
    columns, layout = 147, codec.layout
    row = codec.encode(np.linspace(-1, 2, columns, dtype=np.float32)[None])
    scales, at = layout.scales(row, columns)[0], layout.codes_at(columns)
    for column, value in enumerate(codec.decode(row, columns)[0]):
        group = 0 if layout.group is None else column // layout.group
        byte = at + (column if layout.bits == 8 else column // 32 * 16 + column % 16)
        code = row[0, byte] >> (4 if layout.bits == 4 and column % 32 >= 16 else 0) & (2**layout.bits - 1)
        expected = layout.table[code] * scales[group]
        if layout.zero:
            expected += layout.zeros(row, columns)[0, group]
        assert value == expected
        assert expected.dtype == np.float32


@pytest.mark.parametrize("codec", GROUPED, ids=lambda c: c.name)
def test_codes_begin_and_rows_end_at_multiples_of_16(codec):
    for columns in (1, 31, 32, 3200, 4096, 11008):
        assert codec.layout.codes_at(columns) % 16 == codec.row_bytes(columns) % 16 == 0
        assert codec.layout.table.shape == (2**codec.layout.bits,)


def test_what_a_user_calls_a_codec():
    assert user_codec("int4") is CODECS["int4g64"]
    assert all(user_codec(name) is codec for name, codec in CODECS.items())


def test_unknown_names_are_errors_that_say_which_there_are():
    with pytest.raises(StoreError, match=r"int3.*f32, f16, bf16, int8g32, int8, .*mxfp4; upgrade"):
        codec_named("int3")
    with pytest.raises(StoreError, match="int4"):
        codec_named("int4")
    with pytest.raises(ValueError, match=r"int3.*choose one of f32, f16, bf16.*int4$"):
        user_codec("int3")
