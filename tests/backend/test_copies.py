"""The copy engines against their contract, and the transfers a copy is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.backend import APART, Copies, open_backend
from flashinfer.backend.copies import HostCopies, runs
from tests.backend.copies_conformance import CopiesConformance
from tests.backend.late_copies import LateCopies


class TestHostCopies(CopiesConformance):
    def make(self) -> Copies:
        return HostCopies(1 << 30)

    def look(self, memory: Any) -> Any:
        return memory.copy()


class TestLateCopies(TestHostCopies):
    """The engine other tests find missing waits with is one, too."""

    def make(self) -> Copies:
        return LateCopies(1 << 30)

    def test_before_the_wait_there_is_garbage(self, copies: Copies) -> None:
        memory, source = copies.allocate(8), np.arange(8, dtype=np.uint8)
        copies.upload(memory, np.array([0]), source, np.array([0]), 8)
        assert len(set(memory.tolist())) == 1
        copies.lead()
        assert np.array_equal(memory, source)

    def test_who_writes_to_a_source_before_waiting_is_found_out(self, copies: Copies) -> None:
        memory, source = copies.allocate(8), np.arange(8, dtype=np.uint8)
        copies.upload(memory, np.array([0]), source, np.array([0]), 8)
        copies.lead()
        source[3] = 9
        with pytest.raises(AssertionError, match="written to while"):
            copies.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here: its copies are not tested")
class TestCudaCopies(CopiesConformance):
    def make(self) -> Copies:
        from flashinfer.backend.torch_copies import CudaCopies

        return CudaCopies(torch.device("cuda"))

    def look(self, memory: Any) -> Any:
        return memory.cpu().numpy()


class TestCudaCopiesTogether(TestCudaCopies):
    """With a kernel for many copies at once, from the first on."""

    def make(self) -> Copies:
        triton_copies = pytest.importorskip("flashinfer.backend.triton_copies", reason="Triton is not installed")
        copies: Any = super().make()
        copies.many = triton_copies.fused_copy, triton_copies.can_copy
        return copies

    @pytest.fixture(autouse=True)
    def _none_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flashinfer.backend.torch_copies.FEW", 0)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20), st.integers(1, 5))
def test_runs_are_the_same_copies(pairs: list[tuple[int, int]], size: int) -> None:
    """Transfers cover every record in order; two that follow each other never could be one."""
    targets, sources = (size * np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    found = list(runs(targets, sources, size))
    spread = [(to + i, at + i) for to, at, length in found for i in range(0, length, size)]
    assert spread == list(zip(targets.tolist(), sources.tolist(), strict=True))
    for (to, at, length), (next_to, next_at, _) in pairwise(found):
        assert (to + length, at + length) != (next_to, next_at)


def test_only_a_device_apart_has_copies() -> None:
    for device, kind in (("cpu", type(None)), (APART, HostCopies)):
        backend = open_backend(device, 1)
        assert isinstance(backend.copies, kind)
        backend.close()
