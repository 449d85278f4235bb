"""Which codec of ours holds what a quantised checkpoint holds, and which one is nearest. Pure."""

from __future__ import annotations

from flashinfer.quant.int4 import GROUPS


def group_within(group: int) -> int | None:
    """The largest group of the int4 codecs that divides `group`, so that scales need only be repeated; None: none."""
    return max((g for g in GROUPS if group % g == 0), default=None)


def holding_integers(bits: int, group: int, symmetric: bool) -> str | None:
    """The codec for integers with a float16 scale for each `group` columns of a row.

    symmetric: all zero-points are the middle of the range. Groups of any multiple of 32 columns are held, their scales
    repeated; eight-bit integers with other zero-points are not.
    """
    if bits == 8:
        return "int8g32" if symmetric and group % 32 == 0 else None
    within = group_within(group)
    return None if within is None else f"int4g{within}{'' if symmetric else 'iz'}"


def nearest_integers(bits: int, group: int) -> str:
    """The codec that values of such integers are rounded to where their codes are not kept: as many bits, groups as
    near in size as there are, and of those of four bits the one that was measured to lose least
    (`docs/quantization.md`)."""
    if bits == 8:
        return "int8"
    fitting = [g for g in GROUPS if g <= group]
    return f"int4g{max(fitting, default=min(GROUPS))}iz"


NEAREST_FLOATS = "nf4"
"""The same of four-bit floats of bitsandbytes, `nf4` and `fp4`."""

NEAREST_MXFP4 = "mxfp4"
"""The same of `mxfp4`: where scales of neighbours are often the same power of two, many values stay as they are."""

NEAREST_FP8 = "int8"
"""The same of `fp8` in blocks: with one scale for a row, eight-bit integers lose half of what e4m3 does."""
