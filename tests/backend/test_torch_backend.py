from __future__ import annotations

import pytest

from flashinfer.backend import Backend, torch_backend
from flashinfer.quant import Codec
from tests.backend.backend_conformance import BackendConformance
from tests.backend.code_conformance import CodeConformance


class TorchMaker:
    @pytest.fixture(autouse=True)
    def _always_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)

    def make(self, threads: int) -> Backend:
        return torch_backend.TorchBackend("cpu", threads)


class TestTorchBackend(TorchMaker, BackendConformance):
    pass


class TestCodes(TorchMaker, CodeConformance):
    def rounding(self, codec: str | Codec) -> float:
        return 0.0
