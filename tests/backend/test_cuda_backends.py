"""The backends of a card. They were never run: nobody had one so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashinfer.backend import Backend, has_triton
from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.quant import Codec
from tests.backend.backend_conformance import BackendConformance, everything
from tests.backend.code_conformance import CodeConformance

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here: its arithmetic is not tested", allow_module_level=True)
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed: its kernels are not tested")


class OnTorch:
    def make(self, threads: int) -> Backend:
        return TorchBackend("cuda", threads)

    def rounding(self, codec: str | Codec) -> float:
        return 0.0

    def test_runs_repeat_bit_for_bit(self) -> None:
        for tokens in (1, 32):
            first, second = (everything(self.make(1), tokens) for _ in range(2))
            assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


class OnTriton(OnTorch):
    def make(self, threads: int) -> Backend:
        from flashinfer.backend.triton_backend import TritonBackend

        return TritonBackend("cuda", threads)


class TestTorch(OnTorch, BackendConformance):
    pass


class TestTorchCodes(OnTorch, CodeConformance):
    pass


@needs_triton
class TestTriton(OnTriton, BackendConformance):
    pass


@needs_triton
class TestTritonCodes(OnTriton, CodeConformance):
    pass
