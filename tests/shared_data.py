"""The project's data folder beside the checkout (`../shared/data`): tests that want it skip where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The file or folder `name` of the shared data; skips the calling test where there is none."""
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}")
    return path
