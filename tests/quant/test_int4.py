"""The int4 codecs against a twin in exact fractions, group by group."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashinfer.quant import codec_named
from flashinfer.quant.int4 import GROUPS

GROUP = st.integers(1, 32).flatmap(
    lambda n: hnp.arrays(np.float32, n, elements=st.one_of(st.floats(-60000, 60000, width=32), st.sampled_from([0, 1])))
)


def half_above(value: Fraction) -> Fraction:
    """The least float16 that is no smaller."""
    found = np.float16(float(value))
    while Fraction(float(found)) < value:
        found = np.nextafter(found, np.float16(np.inf))
    while Fraction(float(below := np.nextafter(found, np.float16(-np.inf)))) >= value:
        found = below
    return Fraction(float(found))


def rounded(value: np.float32, scale: Fraction) -> int:
    """The quotient in float32, to nearest even."""
    return int(np.rint(value / np.float32(float(scale)))) if scale else 0


@settings(max_examples=60, deadline=None)
@given(GROUP)
def test_symmetric_bytes_are_those_of_the_definition(group):
    least, most = Fraction(float(group.min())), Fraction(float(group.max()))
    straight, turned = max(most / 7, -least / 8), max(-least / 7, most / 8)
    scale = -half_above(turned) if turned < straight else half_above(straight)
    codec = codec_named("int4g32")
    encoded = codec.encode(group[None])
    assert Fraction(float(codec.layout.scales(encoded, len(group))[0, 0])) == scale
    assert codec.layout.codes(encoded, len(group))[0].tolist() == [8 + rounded(x, scale) for x in group]
    error = [
        abs(Fraction(float(a)) - Fraction(float(b))) for a, b in zip(codec.decode(encoded)[0], group, strict=False)
    ]
    assert max(error) <= abs(scale) / 2 * (1 + Fraction(1, 2**20))


@settings(max_examples=60, deadline=None)
@given(GROUP)
@example(np.array([1.1754944e-38, -1875], np.float32))  # what lies above is more than a float64 holds
def test_bytes_with_a_zero_point_are_those_of_the_definition(group):
    zero = -half_above(-Fraction(float(group.min())))
    scale = half_above(Fraction((float(group.max()) - float(zero)) / 15))
    codec = codec_named("int4g32z")
    encoded = codec.encode(group[None])
    assert Fraction(float(codec.layout.zeros(encoded, len(group))[0, 0])) == zero
    assert Fraction(float(codec.layout.scales(encoded, len(group))[0, 0])) == scale
    codes = [min(15, rounded(x - np.float32(float(zero)), scale)) for x in group]
    assert codec.layout.codes(encoded, len(group))[0].tolist() == codes


@settings(max_examples=60, deadline=None)
@given(GROUP)
def test_bytes_with_an_integer_zero_point_are_those_of_the_definition(group):
    least, most = min(Fraction(float(group.min())), Fraction(0)), max(Fraction(float(group.max())), Fraction(0))
    scale = half_above(Fraction(float((most - least) / 15)))
    codec = codec_named("int4g32iz")
    encoded = codec.encode(group[None])
    stored = int(encoded[0, 2])
    assert Fraction(float(codec.layout.scales(encoded, len(group))[0, 0])) == scale
    assert stored == (rounded(np.float32(float(-least)), scale) if scale else 0)
    codes = [min(15, max(0, rounded(x, scale) + stored)) for x in group]
    assert codec.layout.codes(encoded, len(group))[0].tolist() == codes
    values = [Fraction(float(v)) for v in codec.decode(encoded, len(group))[0]]
    assert values == [(code - stored) * scale for code in codes]
    assert all(
        abs(v - Fraction(float(x))) <= scale * (1 + Fraction(1, 2**18)) for v, x in zip(values, group, strict=True)
    )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["", "z", "iz"])
def test_groups_do_not_see_each_other(group, kind):
    """A row of two groups and a piece has the scales and codes of the three alone."""
    codec = codec_named(f"int4g{group}{kind}")
    row = np.random.default_rng(0).standard_normal(2 * group + 5).astype(np.float32)
    together = codec.encode(row[None])
    for i, part in enumerate(np.split(row, [group, 2 * group])):
        alone = codec.encode(part[None])
        some = slice(i * group, i * group + len(part))
        assert codec.layout.scales(together, len(row))[0, i] == codec.layout.scales(alone, len(part))[0, 0]
        assert np.array_equal(codec.layout.codes(together, len(row))[0, some], codec.layout.codes(alone, len(part))[0])


def test_the_bytes_of_a_row():
    """Golden: scale 1/8, turned, as the largest is positive; columns i and i + 16 share a byte."""
    row = np.zeros((1, 33), np.float32)
    row[0, [0, 1, 16, 32]] = [1, 0.5, -0.875, 2]
    encoded = codec_named("int4g32").encode(row)[0]
    assert encoded[:4].tobytes() == np.array([-0.125, -0.25], "<f2").tobytes()
    assert not encoded[4:16].any()
    assert encoded[16:32].tolist() == [0xF0, 0x84] + [0x88] * 14
    assert encoded[32:].tolist() == [0] * 16


@pytest.mark.parametrize(("name", "most"), [("int4g64", 8 * 65504.0), ("int4g64z", 15 * 65504.0)])
def test_the_range(name, most):
    codec = codec_named(name)
    assert codec.decode(codec.encode(np.array([[0, most]], np.float32)), 2)[0, 1] == most
    with pytest.raises(OverflowError, match=f"the range of {name}; use bf16 or f32"):
        codec.encode(np.array([[0, most * 1.01]], np.float32))
