"""Where arithmetic runs. `open_backend` imports the one asked for, and torch only then."""

from __future__ import annotations

import importlib.util
import logging

from flashinfer import machine
from flashinfer.backend.base import Backend, Buffer, Bundle, Flags, Numbers, Part, Scoring
from flashinfer.backend.copies import Copies, HostCopies
from flashinfer.backend.footprint import Footprint
from flashinfer.config import BackendName
from flashinfer.errors import DeviceError

__all__ = [
    "APART", "Backend", "Buffer", "Bundle", "Copies", "Flags", "Footprint", "Numbers", "Part", "Scoring",
    "device_name", "has_native", "open_backend",
]  # fmt: skip

log = logging.getLogger(__name__)
APART = "apart"
"""A device to test with: the CPU, which computes on what was copied to a memory of its own, as a card has one."""


def has_native() -> bool:
    """Whether the native core was built with this installation."""
    return importlib.util.find_spec("flashinfer.native._kernels") is not None


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def open_backend(device: str, threads: int, choice: BackendName = "auto") -> Backend:
    """The backend for `cpu`, `cuda`, `cuda:N` or `APART`.

    On the CPU `auto` is the native one where it was built, else torch. Other devices are torch's, need one thread,
    and have products of weights computed by Triton where that is installed and runs.

    Raises:
        DeviceError: it is not there.
    """
    if device == APART:
        backend = open_backend("cpu", threads, choice)
        backend.copies = HostCopies(machine.usable_memory())
        return backend
    if device == "cpu" and choice != "torch" and (choice == "native" or has_native()):
        try:
            from flashinfer.backend.native_backend import NativeBackend
        except ImportError as e:
            raise DeviceError(
                f"the native core cannot be used ({e}); install again where there is a C++ compiler, or use torch"
            ) from e
        return NativeBackend(threads)
    from flashinfer.backend.torch_backend import TorchBackend

    return TorchBackend(device, threads) if device == "cpu" else _on_card(device)


def device_name(device: str) -> str:
    """What the device is, to tell it from others: of a card its model.

    Raises:
        DeviceError: it is not there.
    """
    if device in ("cpu", APART):
        return device
    from flashinfer.backend.torch_cuda import card_name

    return card_name(device)


def _on_card(device: str) -> Backend:
    from flashinfer.backend.torch_backend import TorchBackend
    from flashinfer.backend.torch_cuda import explained

    backend = TorchBackend(device)
    if not has_triton():
        return explained(backend, device)
    from flashinfer.backend.triton_backend import TritonBackend, why_not

    if why := why_not(device):
        log.warning("torch computes on %s, slowly: Triton's kernels do not run (%s)", device, why)
        return explained(backend, device)
    backend.close()
    return explained(TritonBackend(device), device)
