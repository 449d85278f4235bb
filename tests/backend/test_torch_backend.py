from __future__ import annotations

import pytest

from flashinfer.backend import Backend, torch_backend
from tests.backend.backend_conformance import BackendConformance


class TestTorchBackend(BackendConformance):
    @pytest.fixture(autouse=True)
    def _always_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)

    def make(self, threads: int) -> Backend:
        return torch_backend.TorchBackend("cpu", threads)
