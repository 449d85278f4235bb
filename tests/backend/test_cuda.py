"""What is said where there is no card, or its memory is used up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashinfer.backend import HostCopies, device_name, open_backend, torch_cuda
from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.cache import device_cache
from flashinfer.errors import DeviceError
from tests.backend.backend_conformance import everything

# -- no card


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch):
    """`cards(n)`: torch, built with CUDA, sees n of them."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "mps"])
def test_a_name_that_is_none(device: str) -> None:
    with pytest.raises(
        DeviceError, match=f"device '{device}' is not known; choose cuda or cuda:N, or use --device cpu"
    ):
        TorchBackend(device)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"built without CUDA; install a build that has it, or use --device cpu"):
        open_backend("cuda", 1)


def test_no_card(cards) -> None:
    cards(0)
    with pytest.raises(DeviceError, match=r"finds no card .*`nvidia-smi` .*CUDA 12.8 or newer; or use --device cpu"):
        open_backend("cuda", 1)


def test_not_so_many_cards(cards) -> None:
    cards(2)
    with pytest.raises(DeviceError, match=r"there is no cuda:2: torch sees 2 \(the first is cuda:0\)"):
        open_backend("cuda:2", 1)


def test_products_are_not_rounded_to_tf32(cards) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cards(2)
        assert torch_cuda.open_card("cuda:1") == torch.device("cuda:1")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


# -- memory


@pytest.mark.parametrize("verb", ["zeros", "matrix", "new_kv", "ffn"])
def test_memory_that_is_used_up_is_one_line(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend("cpu", 1)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(backend, verb, full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 24 << 30))
    with pytest.raises(DeviceError, match=r"cuda:0 ran out of memory, 1.* of its 2.* are free") as caught:
        getattr(torch_cuda.explained(backend, "cuda:0"), verb)()
    assert "\n" not in str(caught.value)


def test_memory_that_is_used_up_in_a_step_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend("cpu", 1)
    backend.copies = HostCopies(1 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 24 << 30))
    explained = torch_cuda.explained(backend, "cuda:0")
    cache = device_cache(
        explained, 8, 2, 2, window=2, retention="frequency", record_of=np.arange(8), within=np.zeros(8, dtype=np.int64)
    )
    assert cache is not None
    assert cache.step(np.array([1, 2])).misses.tolist() == [1, 2]

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "where", full)
    with pytest.raises(DeviceError, match=r"cuda:0 ran out of memory"):
        cache.choose(torch.ones(1, 8, dtype=torch.bool))


def test_a_card_is_told_from_others(cards, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert [device_name(name) for name in ("cpu", "cuda:0", "cuda:1")] == ["cpu", "card 0", "card 1"]
    cards(0)
    with pytest.raises(DeviceError, match="finds no card"):
        device_name("cuda")


def test_verbs_that_are_explained_are_the_same() -> None:
    plain, explained = TorchBackend("cpu", 1), torch_cuda.explained(TorchBackend("cpu", 1), "cuda")
    assert all(np.array_equal(a, b) for a, b in zip(everything(plain, 16), everything(explained, 16), strict=True))
