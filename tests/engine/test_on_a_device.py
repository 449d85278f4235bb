"""Every family and codec on a device: a card where there is one, else the CPU with a memory of its own, by torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.backend import APART
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.store import open_store
from tests import families
from tests.families import CASES, make

DEVICE = "cuda" if torch.cuda.is_available() else APART
PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 89, 36)]
DECODED = [int(t) for t in np.random.default_rng(8).integers(3, 89, 4)]
RUN = RunConfig(backend="torch", threads=1)
LARGE = 1 << 33
QUANTS = ["int8", "int4g64", "q4_0", "nf4"]


def half_of(store: Path) -> Cap:
    """The device's floor and half of the weights, and a quarter in DRAM."""
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=LARGE, vram=1), run=RUN, device=DEVICE)
    with pytest.raises(CapTooSmallError) as host:
        Model.open(store, Cap(weight_memory=1, vram=e.value.floor), run=RUN, device=DEVICE)
    size = open_store(store).manifest.weight_bytes()
    return Cap(weight_memory=host.value.floor + size // 4, vram=e.value.floor + size // 2)


def logits(store: Path, cap: Cap, device: str) -> np.ndarray:
    """After each token: the prompt's, and those that are decoded."""
    with Model.open(store, cap, run=RUN, device=device) as model:
        session = model.session()
        return np.concatenate([model.logits(session, PROMPT), *(model.logits(session, [t]) for t in DECODED)])


@pytest.mark.parametrize("case", CASES)
def test_a_family_agrees_with_transformers(tmp_path: Path, case: str) -> None:
    pack(make(case, tmp_path / "checkpoint"), tmp_path / "store")
    found = logits(tmp_path / "store", half_of(tmp_path / "store"), DEVICE)
    with torch.no_grad():
        model = families.reference(case, tmp_path / "checkpoint")
        expected = model(torch.tensor([PROMPT + DECODED])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4


@cache
def checkpoint(root: Path) -> Path:
    return make("llama-relu", root / "llama-relu")


@pytest.mark.parametrize("quant", QUANTS)
def test_a_codec_agrees_with_the_cpu_and_repeats(tmp_path_factory, quant: str) -> None:
    """The bits of the CPU where the device is the CPU; on a card its own, each time."""
    root = tmp_path_factory.getbasetemp()
    pack(checkpoint(root), root / quant, quant=quant)
    cap = half_of(root / quant)
    once, again = logits(root / quant, cap, DEVICE), logits(root / quant, cap, DEVICE)
    assert np.array_equal(once, again)
    expected = logits(root / quant, Cap(), "cpu")
    assert np.abs(once - expected).max() <= (1e-4 if torch.cuda.is_available() else 0)
