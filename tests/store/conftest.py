from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.pack import pack
from flashinfer.store import open_store
from tests.plain_checkpoint import OPT, write_checkpoint
from tests.store.predicted import add_predictors


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain llama checkpoint; nobody may change it."""
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture(scope="session")
def permutations() -> list[list[int]]:
    return [[(n * 8 + 3) % 21 for n in range(21)], list(range(20, -1, -1))]


@pytest.fixture(scope="session")
def _packed(checkpoint: Path, permutations: list[list[int]]) -> Path:
    store = checkpoint.parent / "store"
    pack(checkpoint, store, bundles_per_record=2, permutation=permutations)
    return store


@pytest.fixture
def store(_packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed plain checkpoint (permuted, 2 bundles to a record), free to be damaged."""
    return Path(shutil.copytree(_packed, tmp_path / "store"))


@pytest.fixture(scope="session")
def _calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    pack(write_checkpoint(folder / "checkpoint", OPT), folder / "store", decision="bundled", bundles_per_record=2)
    return add_predictors(open_store(folder / "store")).root


@pytest.fixture
def calibrated(_calibrated: Path, tmp_path: Path) -> Path:
    """A copy of a bundled store with decision biases, all predictors and a calibration, free to be damaged."""
    return Path(shutil.copytree(_calibrated, tmp_path / "calibrated"))


@pytest.fixture
def fake_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`fake_call(target, error, after)`: the call of that dotted name raises once it was made `after` times."""

    def install(owner: object, name: str, error: BaseException, after: int = 0) -> list[int]:
        real = getattr(owner, name)
        calls = [0]

        def fake(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == after + 1:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, fake)
        return calls

    return install
