"""Byte sizes as people write them, both ways."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_SCALE = {
    "": 1, "b": 1, "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3,
    "t": 1000**4, "tb": 1000**4, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
}  # fmt: skip
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
