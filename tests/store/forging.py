"""Stores whose manifest was changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.store_contents import manifest_of

Forge = Callable[[dict[str, Any]], Any]


def forge(store: Path, change: Forge) -> None:
    m = manifest_of(store)
    change(m)
    (store / "manifest.json").write_text(json.dumps(m))


def put(path: str, value: Any) -> Forge:
    """Set one value by its dotted path (`/` where keys have dots themselves)."""

    def change(m: Any) -> None:
        *way, last = path.split("/")
        for step in way:
            m = m[int(step) if isinstance(m, list) else step]
        m[int(last) if isinstance(m, list) else last] = value

    return change


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
