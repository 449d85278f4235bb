"""Experts in a store: whole records each, and a manifest that says otherwise is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.config import TILE_NEURONS
from flashinfer.errors import CheckpointError, StoreError
from flashinfer.store import Experts, open_store
from flashinfer.store.geometry import LARGEST_EXPERT_RECORD, expert_bundles_per_record, expert_records, tile_records
from tests.families import make
from tests.store.forging import Forge, forge, put


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("experts")
    checkpoint = make("qwen2_moe", root / "checkpoint")
    pack(checkpoint, root / "store")
    return checkpoint, root / "store"


FORGED: dict[str, tuple[Forge, str]] = {
    "none listed": (put("layers/0/experts", None), "or none of theirs"),
    "one missing": (lambda m: m["layers"][0]["experts"].pop(), "lists 6 experts, facts say 7"),
    "out of order": (lambda m: m["layers"][0]["experts"].reverse(), "do not follow each other"),
    "decision apart": (put("layers/0/decision", "separate"), "decision matrix apart"),
    "permuted": (put("layers/0/permutation", "layers.0.ffn.order"), r"ffn\.order is missing"),
    "neurons": (put("facts/experts/size", 25), "neurons, facts say otherwise"),
    "no router": (lambda m: m["tensors"].pop("layers.0.ffn.router.weight"), r"ffn\.router\.weight is missing"),
    "no gate": (lambda m: m["tensors"].pop("layers.0.ffn.shared_gate.weight"), r"shared_gate\.weight is missing"),
    "all dense": (put("facts/experts/dense", [0, 1, 2]), "unknown role"),
    "unknown fact": (put("facts/experts/colour", 1), "unknown field `colour`"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged(packed, tmp_path: Path, name: str) -> None:
    change, message = FORGED[name]
    shutil.copytree(packed[1], tmp_path / "store")
    forge(tmp_path / "store", change)
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path / "store")


def test_neither_permuted_nor_cut_anyhow(packed, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neurons of experts stay in their order"):
        pack(packed[0], tmp_path / "store", permutation=[np.arange(176)] * 3)
    with pytest.raises(CheckpointError, match="bundles per record 5 does not divide 8"):
        pack(packed[0], tmp_path / "store", bundles_per_record=5)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 6), st.integers(1, 2 * LARGEST_EXPERT_RECORD))
def test_records(size: int, shared: int, count: int, bundle: int) -> None:
    """As large as they may be, whole experts, all of them, one behind the other."""
    experts = Experts(count, 1, size, shared_size=shared)
    per = expert_bundles_per_record(bundle, experts)
    assert size % per == shared % per == 0
    assert per == 1 or per * bundle <= LARGEST_EXPERT_RECORD
    ranges = expert_records(experts, per)
    assert len(ranges) == experts.columns
    assert [first for first, _ in ranges] == np.cumsum([0, *(n for _, n in ranges[:-1])]).tolist()
    assert sum(n for _, n in ranges) * per == experts.neurons


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 20), st.booleans())
def test_records_of_a_tile(per: int, records: int, skipped: int, together: bool) -> None:
    """No tile of neurons that follow each other lies in more records than are counted with."""
    start = skipped * TILE_NEURONS
    tile = np.arange(start, start + TILE_NEURONS)
    tile = tile[tile < records * per]
    assert len(np.unique(tile // per)) <= tile_records(per, records, together=together)
