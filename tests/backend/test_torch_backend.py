from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.backend import Backend, torch_backend
from flashinfer.backend.torch_weights import pack_int8g32
from flashinfer.quant import Codec, codec_named
from tests.backend.backend_conformance import BackendConformance, Layer, normal, tiles_of
from tests.backend.code_conformance import CodeConformance


class TorchMaker:
    @pytest.fixture(autouse=True)
    def _always_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)

    def make(self, threads: int) -> Backend:
        return torch_backend.TorchBackend("cpu", threads)


class TestTorchBackend(TorchMaker, BackendConformance):
    @pytest.mark.parametrize("codec", ["f16", "int4g64"])
    def test_bundles_in_memory_of_the_device(self, codec: str) -> None:
        """A tensor of bytes gives the same bits as an array of the host, also as a part of a larger one."""
        backend, layer, index = self.make(2), Layer(codec, 150, 96, gated=True, bias=True, decision=True), tiles_of(150)
        larger = torch.cat([torch.full((6,), 0xA5, dtype=torch.uint8), torch.from_numpy(layer.memory)])

        def run(memory: Any) -> Any:
            x, gate, acc = (backend.place(normal(i, 16, n)) for i, n in enumerate((96, 150, 96)))
            backend.decide(gate, x, index, memory, layer.offsets(index), layer.bundle)
            backend.ffn(acc, x, backend.fire(gate, "relu", index), memory, layer.offsets(index), layer.bundle)
            return backend.fetch(acc)

        assert np.array_equal(run(larger[6:]), run(layer.memory))
        backend.close()


class TestCodes(TorchMaker, CodeConformance):
    def rounding(self, codec: str | Codec) -> float:
        return 0.0


@given(st.integers(1, 9), st.integers(1, 100), st.integers(0, 2**32 - 1), st.sampled_from([-40, -10, 0, 10]))
def test_int8g32_is_encoded_with_the_bits_of_the_codec(rows: int, elements: int, seed: int, scale: int) -> None:
    """Quotients between two integers and blocks of zeros among them."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** (scale + rng.integers(-8, 8, (rows, 1)))
    values = (rng.standard_normal((rows, elements)) * sizes).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = 0
    values[0, : elements // 2] = np.round(values[0, : elements // 2])
    expected = codec_named("int8g32").encode(values)
    assert np.array_equal(pack_int8g32(torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 127 * 65520.0])
def test_what_int8g32_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(OverflowError, match="the range of int8g32"):
        pack_int8g32(torch.tensor([[1.0, bad]]))
