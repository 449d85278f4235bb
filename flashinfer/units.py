"""Byte sizes as people write them, both ways."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_SCALE = {
    "": 1, "b": 1, "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3,
    "t": 1000**4, "tb": 1000**4, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
}  # fmt: skip
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes for `"4GiB"`, `"512MB"`, `"1.5g"` or a plain number. GB is 10^9, GiB is 2^30.

    Raises:
        ValueError: the text is no size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    scale = _SCALE.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not a size; write e.g. 4GiB, 512MB or 1073741824")
    return int(float(match[1]) * scale)


def parse_cap_size(text: str | int, whole: int | None = None) -> int:
    """Bytes of a cap: as `parse_size`, but not nothing; also `"50%"`, a share of `whole`, where that is given.

    Raises:
        ValueError: the text is no size and no share, or says 0, or more than 100 %.
    """
    if isinstance(text, str) and (share := _SHARE.fullmatch(text)):
        if whole is None:
            raise ValueError(f"{text!r} is a share of the machine's memory, which only --memory takes; write e.g. 2GiB")
        if not 0 < float(share[1]) <= 100:
            raise ValueError(f"{text!r} is no share of the memory; write more than 0% and at most 100%")
        return int(whole * float(share[1]) / 100)
    size = parse_size(text)
    if size < 1:
        raise ValueError(f"a cap of {text!r} holds nothing; write e.g. 4GiB or 50%")
    return size


def parse_share(text: str) -> float:
    """A share from `"1%"` or `"0.01"`. Raises ValueError: the text is no share of at least 0."""
    if match := _SHARE.fullmatch(text):
        return float(match[1]) / 100
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < float("inf"):
        raise ValueError(f"{text!r} is not a share; write e.g. 1% or 0.01")
    return share


def format_size(count: float) -> str:
    """A size with a binary unit and three significant digits: `1.25 GiB`, `768 B`."""
    if abs(count) < KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 1000 or unit == "TiB":
            break
    digits = 2 if abs(count) < 10 else 1 if abs(count) < 100 else 0
    return f"{count:.{digits}f} {unit}"
