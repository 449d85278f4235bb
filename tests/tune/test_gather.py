"""Reading a store's weights in any order: only what was asked for, and near neighbours in one read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashinfer.errors import StoreReadError
from flashinfer.pack import pack
from flashinfer.store import Store, open_store
from flashinfer.tune.gather import Source
from tests.plain_checkpoint import LLAMA, fill, llama_shapes, write_checkpoint

WIDE = LLAMA | {"hidden_size": 512, "intermediate_size": 96}
BUNDLE = 3 * 4 * 512


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Bundled, one bundle of 6 KiB to a record, in a shuffled order."""
    folder = tmp_path_factory.mktemp("wide")
    orders = [np.random.default_rng(i).permutation(96) for i in range(2)]
    pack(
        write_checkpoint(folder / "c", WIDE), folder / "s", decision="bundled", permutation=orders, bundles_per_record=1
    )
    return open_store(folder / "s")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of an open file."""
    seen: list[int] = []
    real = os.preadv

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(sum(len(b) for b in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    return seen


def positions(store: Store, layer: int) -> np.ndarray:
    return store.geometry(layer).positions(np.arange(96))


@pytest.mark.parametrize("part", ["gate.weight", "up.weight", "down.weight"])
def test_rows_come_in_the_order_asked(store, part):
    whole = fill(llama_shapes(WIDE))[f"model.layers.1.mlp.{part.replace('.', '_proj.')}"]
    rows = whole.T if part == "down.weight" else whole
    chosen = np.array([90, 3, 3, 41, 0])
    with Source(store) as source:
        found = source.parts(1, chosen, [part])[part]
        assert (np.ascontiguousarray(found).view("<f4") == rows[chosen]).all()
        some = source.parts(1, slice(7, 60), [part])[part]
        assert (np.ascontiguousarray(some).view("<f4") == rows[7:60]).all()


def test_wide_holes_are_not_read(store, reads):
    by_place = np.argsort(positions(store, 0))
    with Source(store) as source:
        source.parts(0, by_place[:1], ["up.weight"])
        reads.clear()
        source.parts(0, by_place[[80, 10, 50]], ["gate.weight", "up.weight", "down.weight"])
        assert reads == [BUNDLE] * 3
        reads.clear()
        source.parts(0, by_place[[13, 12, 10]], ["gate.weight", "up.weight", "down.weight"])
        assert reads == [4 * BUNDLE]
        reads.clear()
        source.parts(0, by_place[[5]], ["up.weight"])
        assert reads == [BUNDLE // 3]


def test_a_layer_is_checked_once_from_end_to_end(store, reads):
    with Source(store) as source:
        source.parts(0, slice(0, 1), ["up.weight"])
        first = sum(reads)
        source.parts(0, slice(1, 2), ["up.weight"])
        assert first == store.manifest.layers[0].bytes + BUNDLE // 3
        assert sum(reads) == first + BUNDLE // 3


def test_files_that_are_gone(store, tmp_path):
    gone = Store(tmp_path, store.manifest)
    with pytest.raises(StoreReadError, match="dense-"):
        Source(gone).__enter__()
    (tmp_path / store.manifest.dense.name).symlink_to(store.path_of(store.manifest.dense))
    with pytest.raises(StoreReadError, match="dense-"):
        Source(gone).__enter__()


def test_nothing_stays_open(store):
    before = sorted(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else []
    with Source(store) as source:
        source.parts(0, slice(0, 1), ["up.weight"])
    after = sorted(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else []
    assert len(before) == len(after)
