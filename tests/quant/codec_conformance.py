"""What every codec must do. A test class inherits this, and provides the fixture `codec`.

The bounds are those of the definitions, as shares of the largest magnitude of the group that a value belongs to; they
stand here and not beside the codecs so that a codec cannot loosen its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import Codec, Grouped, LlmInt8, grouped
from tests.quant.samples import weights

F64 = npt.NDArray[np.float64]

RELATIVE = {"f16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4, "llm.int8": 2.0**-11}
"""Error relative to the value itself."""
SHARED = {
    "int8g32": 1 / 254,
    "int8": 1 / 254,
    "llm.int8": 1 / 254,
    "dynamic8": 0.0072,  # half a step at 1, as far as the map ends before -1
    "fp8": 2.0**-10 / 448,
    "q4_0": 1 / 8,  # the other end of the range is cut off
    "nf4": (1 - 0.6961928) / 2 + 0.0073,  # half the widest step, and the scale's own error
    "nf4f32": (1 - 0.6961928) / 2,
    "mxfp4": 1 / 4,  # from 6 to the next power of two, 8, is cut off
    **{f"int4g{g}": 1 / 14 for g in (32, 64, 128)},
    **{f"int4g{g}z": 2 / 30 + 2.0**-12 for g in (32, 64, 128)},
    **{f"int4g{g}iz": 2 / 15 for g in (32, 64, 128)},
}
"""Error relative to the largest of the group; of nf4 to that of the row, which the scales share."""
ROUNDING = 2.0**-9
"""What the rounding of scales adds to a bound."""
SMALLEST = {"f16": 2.0**-24, "llm.int8": 2.0**-24, "bf16": 2.0**-133, "int8g32": 2.0**-25, "q4_0": 2.0**-21}
SMALLEST |= dict.fromkeys([name for name in SHARED if name.startswith("int4")], 2.0**-24)
FLUSHED = 1e-34
"""What codecs of float32 scales may lose, however small the scale."""
REACH = {"f16": 65504.0, "bf16": 3.39e38, "int8g32": 127 * 65504.0, "q4_0": 8 * 65504.0}
REACH |= dict.fromkeys([name for name in SHARED if name.startswith("int4")], 65504.0)
"""What surely fits, of those that hold less than float32; the extreme values here lie far from it."""
ROWS = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150).flatmap(
    lambda shape: hnp.arrays(np.float32, (min(shape[0], 3), shape[1]), elements=st.floats(-60000, 60000, width=32))
)


def group_of(codec: Codec, columns: int) -> int:
    """Columns that an error may be relative to."""
    if codec.name == "int8g32":
        return 32
    group = codec.layout.group if isinstance(codec, Grouped) and codec.name != "nf4" else None
    return group or columns


def columns_needed(codec: Codec) -> int:
    """The shortest row a codec can be asked for."""
    return 1 + max(codec.outliers, default=0) if isinstance(codec, LlmInt8) else 1


def bound(codec: Codec, rows: npt.NDArray[np.float32]) -> F64:
    """The largest error that is allowed, `[n, elements]`."""
    sizes = np.abs(rows).astype(np.float64)
    group = group_of(codec, rows.shape[1])
    starts = range(0, rows.shape[1], group)
    largest = np.repeat(np.maximum.reduceat(sizes, starts, axis=1), group, axis=1)[:, : rows.shape[1]]
    exact = codec.name == "f32"
    shares = RELATIVE.get(codec.name, 0) * sizes + SHARED.get(codec.name, 0) * largest
    return shares * (1 + ROUNDING) + (0 if exact else SMALLEST.get(codec.name, FLUSHED))


def assert_within_bound(codec: Codec, rows: npt.NDArray[np.float32]) -> None:
    encoded = codec.encode(rows)
    assert (encoded.dtype, encoded.shape) == (np.uint8, (len(rows), codec.row_bytes(rows.shape[1])))
    back = codec.decode(encoded, rows.shape[1])
    assert (back.dtype, back.shape) == (np.float32, rows.shape)
    assert (np.abs(back.astype(np.float64) - rows) <= bound(codec, rows)).all()


class CodecConformance:
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=ROWS)
    def test_the_error_is_within_its_bound(self, codec, rows):
        missing = max(0, columns_needed(codec) - rows.shape[1])
        assert_within_bound(codec, np.pad(rows, ((0, 0), (0, missing))))

    @pytest.mark.parametrize("columns", [1, 16, 31, 33, 96, 129, 2049, 3200, 16448])
    def test_every_length_of_a_row(self, codec, columns):
        """Shorter last blocks, of 16448 columns a second block of nested scales."""
        assert_within_bound(codec, weights(2, max(columns, columns_needed(codec))))

    def test_larger_blocks_change_nothing_of_what_is_decoded(self, codec):
        encoded = codec.encode(weights(2, 256))
        assert np.array_equal(codec.decode(encoded), codec.decode(encoded, 256))
        assert np.array_equal(codec.decode(encoded)[:, :128], codec.decode(encoded, 256)[:, :128])

    def test_no_rows(self, codec):
        encoded = codec.encode(np.zeros((0, 40), np.float32))
        assert encoded.shape == (0, codec.row_bytes(40))
        assert codec.decode(encoded, 40).shape == (0, 40)

    def test_many_rows_at_once_are_row_by_row(self, codec, monkeypatch):
        rows = weights(6, 190)
        encoded = np.concatenate([codec.encode(row[None]) for row in rows])
        decoded = np.concatenate([codec.decode(row[None], 190) for row in encoded])
        for piece in (1, 400, 1 << 20):
            monkeypatch.setattr(grouped, "_PIECE", piece)
            assert np.array_equal(codec.encode(rows), encoded)
            assert np.array_equal(codec.decode(encoded, 190), decoded)

    def test_strided_rows(self, codec):
        rows = weights(8, 360)
        assert np.array_equal(codec.encode(rows[::2, ::3]), codec.encode(rows[::2, ::3].copy()))
        encoded = codec.encode(rows)
        assert np.array_equal(codec.decode(encoded[::2], 360), codec.decode(encoded[::2].copy(), 360))

    def test_rows_are_not_written_to(self, codec):
        rows = weights(2, 100)
        rows.flags.writeable = False
        encoded = codec.encode(rows)
        encoded.flags.writeable = False
        assert np.isfinite(codec.decode(encoded, 100)).all()

    def test_zeros_stay_zeros(self, codec):
        assert not codec.decode(codec.encode(np.zeros((2, 300), np.float32)), 300).any()

    @pytest.mark.parametrize("value", [1.0, -0.3, 1e-6, 5000.0])
    def test_rows_of_one_value(self, codec, value):
        assert_within_bound(codec, np.full((1, 200), value, np.float32))

    @pytest.mark.parametrize("value", [3.4028235e38, 1e38, 1e20, 1e-30, 1e-38, 1e-45])
    def test_extreme_values_fit_or_are_refused(self, codec, value):
        rows = weights(2, 200)
        rows[1, 77] = value
        rows[0] = -rows[1]
        if value > REACH.get(codec.name, np.inf):
            with pytest.raises(OverflowError, match=f"range of {codec.name}"):
                codec.encode(rows)
        else:
            assert_within_bound(codec, rows)

    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
    def test_what_is_not_finite_is_kept_or_refused(self, codec, value):
        rows = weights(2, 200)
        rows[1, 3] = value
        if codec.name in ("f32", "f16", "bf16"):
            assert np.array_equal(codec.decode(codec.encode(rows), 200)[1, 3], value, equal_nan=True)
        else:
            with pytest.raises(OverflowError, match="no number"):
                codec.encode(rows)
