"""Many copies as one launch against copies one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backend.on_triton import CARD, DEVICE, runs  # isort: skip  (skips without Triton)

from flashinfer.backend.copies import HostCopies
from flashinfer.backend.triton_copies import can_copy, fused_copy, probe

pytestmark = runs
UNIT, ROOM = 16, 40


def memories(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two memories, at addresses that suit: the device's, and one that stands for the host's."""
    both = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, UNIT * ROOM), dtype=np.uint8))
    return both[0].to(DEVICE), both[1].pin_memory() if CARD else both[1].clone()


@given(
    units=st.integers(0, 3), pairs=st.lists(st.tuples(*[st.integers(0, ROOM // 4)] * 2), max_size=6),
    down=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_they_are_the_same_copies(units: int, pairs: list[tuple[int, int]], down: bool, seed: int) -> None:
    """To the device and back, records of any length, in any order; no two targets overlap."""
    step, size = UNIT * max(1, units), UNIT * units
    places = {to: at for to, at in pairs if (max(to, at) + 1) * step <= UNIT * ROOM}
    targets, sources = (np.array(list(some), dtype=np.int64) * step for some in (places.keys(), places.values()))
    device, host = memories(seed)
    target, source = (host, device) if down else (device, host)
    expected = target.cpu().numpy().copy()
    HostCopies(1 << 20).upload(expected, targets, source.cpu().numpy(), sources, size)
    assert can_copy(target, source, targets, sources, size)
    fused_copy(target, targets, source, sources, size, torch.device(DEVICE))
    if CARD:
        torch.cuda.synchronize()
    assert np.array_equal(target.cpu().numpy(), expected)


def test_records_larger_than_a_program_takes() -> None:
    source = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8)).to(DEVICE)
    target = torch.zeros_like(source)
    fused_copy(target, np.array([16, 32_000]), source, np.array([24_000, 0]), 20_000 - 16, torch.device(DEVICE))
    found, given_ = target.cpu().numpy(), source.cpu().numpy()
    assert np.array_equal(found[16:20_000], given_[24_000:43_984])
    assert np.array_equal(found[32_000:51_984], given_[:19_984])
    assert not found[:16].any()
    assert not found[20_000:32_000].any()
    assert not found[51_984:].any()


@pytest.mark.parametrize("wrong", ["targets", "sources", "size", "address"])
def test_what_does_not_suit_is_not_taken(wrong: str) -> None:
    target, source = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    targets, sources = (np.array([0, 32 + 8 * (wrong == name)]) for name in ("targets", "sources"))
    target = target[8:248] if wrong == "address" else target
    assert not can_copy(target, source, targets, sources, 24 if wrong == "size" else 32)
    assert can_copy(source, source, np.array([0, 32]), np.array([64, 128]), 32)


def test_the_probe_finds_it_right() -> None:
    probe(torch.device(DEVICE))
