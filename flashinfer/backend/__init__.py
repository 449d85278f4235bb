"""Where arithmetic runs. `open_backend` imports the one asked for, and torch only then."""

from __future__ import annotations

from flashinfer.backend.base import Backend, Buffer, Bundle, Part

__all__ = ["Backend", "Buffer", "Bundle", "Part", "open_backend"]


def open_backend(device: str, threads: int) -> Backend:
    """The backend for `cpu`, `cuda` or `cuda:N`. Raises DeviceError when it is not there."""
    from flashinfer.backend.torch_backend import TorchBackend

    return TorchBackend(device, threads)
