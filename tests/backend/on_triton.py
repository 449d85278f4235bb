"""What tests of Triton's kernels share: a backend that has them, and its twin; in Triton's interpreter, or on a card
where there is one."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from flashinfer.backend import triton_attend, triton_linear
from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.triton_backend import TritonBackend
from flashinfer.quant import GROUPED
from tests.backend.backend_conformance import CODECS

CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"
KNOWN = [*CODECS, *(c.name for c in GROUPED)]
runs = pytest.mark.skipif(
    not CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="no card, and Triton was not told to interpret"
)


@pytest.fixture
def larger_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each, and for each step of its loop."""
    if not CARD:
        monkeypatch.setattr(triton_linear, "ONE", triton_linear.ONE._replace(rows=64))
        monkeypatch.setattr(triton_linear, "SOME", triton_linear.Cut(64, 128))
        monkeypatch.setattr(triton_attend, "ONE", triton_linear.Cut(128, 64))
        monkeypatch.setattr(triton_attend, "SOME", triton_linear.Cut(128, 64))


@pytest.fixture
def fused():
    backend = TritonBackend(DEVICE, 2)
    yield backend
    backend.close()


@pytest.fixture
def twin():
    backend = TorchBackend(DEVICE, 1)
    yield backend
    backend.close()
