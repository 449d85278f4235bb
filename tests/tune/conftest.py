from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tune.calibrating import KINDS, make_store, words


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Each step of a calibration ends with a collection of garbage, which need not look at what tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny models are calibrated on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(400))
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each kind. Read only: who calibrates takes a copy."""
    return {kind: make_store(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
