"""Masks that went to disk are counted as if they had been counted at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.errors import StoreError
from flashinfer.model.observe import Seen
from flashinfer.store import Store, open_store
from flashinfer.tune import census
from flashinfer.tune.census import MaskFiles, count
from flashinfer.tune.statistics import LayerCounter
from tests.plain_checkpoint import LLAMA, write_checkpoint
from tests.tune.test_statistics import text

NEURONS, LAYERS, HIDDEN = LLAMA["intermediate_size"], LLAMA["num_hidden_layers"], LLAMA["hidden_size"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Permuted, several neurons to a record: counting goes by the original order, the replay by the stored one."""
    root = tmp_path_factory.mktemp("census")
    orders = [np.random.default_rng(i).permutation(NEURONS) for i in range(LAYERS)]
    pack(write_checkpoint(root / "checkpoint"), root / "store", permutation=orders, bundles_per_record=2)
    return open_store(root / "store")


def steps(needed: np.ndarray | None, active: np.ndarray, size: int) -> list[Seen]:
    found = []
    for start in range(0, len(active), size):
        some = slice(start, start + size)
        x = np.zeros((len(active[some]), HIDDEN), np.float32)
        found.append(Seen(x, x, active[some], None if needed is None else needed[some]))
    return found


@pytest.mark.parametrize(("size", "block"), [(1, 256), (7, 256), (50, 16)])
def test_they_are_what_direct_counting_gives(
    store: Store, tmp_path: Path, size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "COUNTED", block)
    needed = [text(50, NEURONS, layer, 0.5) for layer in range(LAYERS)]
    active = [n & text(50, NEURONS, 9 + layer, 0.8) for layer, n in enumerate(needed)]
    with MaskFiles(tmp_path, "needed", store) as whom, MaskFiles(tmp_path, "fired", store, fired=True) as who:
        for layer in range(LAYERS):
            for step in steps(needed[layer], active[layer], size):
                whom.seen(layer, step)
                who.seen(layer, step)
    for files, masks in ((whom, needed), (who, active)):
        found = count(store, files.paths)
        assert len(found) == LAYERS
        for layer, mask in enumerate(masks):
            direct = LayerCounter(store.geometry(layer))
            direct.add(mask)
            assert found[layer] == direct.result()
        assert found[0] != found[1]
    assert list(tmp_path.iterdir()) == []


def test_nobody_named_is_everyone(store: Store, tmp_path: Path) -> None:
    active = text(20, NEURONS, 0)
    with MaskFiles(tmp_path, "needed", store) as whom, MaskFiles(tmp_path, "fired", store, fired=True) as who:
        for layer in range(LAYERS):
            for step in steps(None, active, 20):
                whom.seen(layer, step)
                who.seen(layer, step)
    assert [s.density for s in count(store, whom.paths)] == [1.0] * LAYERS
    assert [s.density for s in count(store, who.paths)] == pytest.approx([active.mean()] * LAYERS)


def test_files_of_an_interrupted_run_are_not_counted(store: Store, tmp_path: Path) -> None:
    files = MaskFiles(tmp_path, "needed", store)
    with pytest.raises(KeyboardInterrupt), files:
        raise KeyboardInterrupt
    with pytest.raises(StoreError, match="not whole"):
        count(store, files.paths)


def test_too_few_tokens(store: Store, tmp_path: Path) -> None:
    with MaskFiles(tmp_path, "needed", store) as files:
        for layer in range(LAYERS):
            files.seen(layer, steps(None, text(16, NEURONS, 0), 16)[0])
    with pytest.raises(ValueError, match="17 tokens"):
        count(store, files.paths)
