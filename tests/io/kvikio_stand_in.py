"""As much of kvikio as the reader uses, on the host's memory: what a device shows as its own is taken to be the host's.

It does as kvikio 26.4 and 26.10 do in their compatibility mode: reads below `gds_threshold` are made at once and raise
at once, others by threads; a result is told once; what fails is a RuntimeError that begins with a place in its source.
`tests/io/test_kvikio_real.py` compares the signatures with those of the real one where it is installed.
"""

from __future__ import annotations

import ctypes
import enum
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashinfer.io import KvikioReader, ThreadReader

PLACE = "KvikIO failure at: /src/posix_io.hpp:164: POSIX error on pread: "
GDS_THRESHOLD = 16384


class CompatMode(enum.Enum):
    OFF = 0
    ON = 1
    AUTO = 2


class IOFuture:
    def __init__(self, future: Future[int]) -> None:
        self._future: Future[int] | None = future

    def get(self) -> int:
        if self._future is None:
            raise RuntimeError("std::future_error: No associated state")
        try:
            return self._future.result()
        finally:
            self._future = None


class StandIn:
    """A module `kvikio`. gds: whether GPUDirect Storage is there; cufile: the version of libcufile; setting: what
    KVIKIO_COMPAT_MODE says; driver_error: what any read fails with."""

    __version__ = "0.0.stand-in"
    __spec__ = ModuleSpec("kvikio", None)
    CompatMode = CompatMode

    def __init__(
        self,
        *,
        gds: bool = False,
        cufile: tuple[int, int] = (1, 14),
        udev: bool = True,
        setting: CompatMode = CompatMode.AUTO,
        driver_error: str = "",
    ) -> None:
        self.settings: dict[str, Any] = {"compat_mode": setting, "num_threads": 1, "bounce_buffer_size": 1 << 24}
        self.gds, self.cufile, self.udev, self.driver_error = gds, cufile, udev, driver_error
        self.opened: list[CompatMode] = []
        self.freed = 0
        stand_in = self

        class CuFile:
            def __init__(self, file: Any, flags: str = "r") -> None:
                try:
                    self.fd = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise RuntimeError(f"Unable to open file. at: /src/file_utils.cpp:154: {error.strerror}") from None
                stand_in.opened.append(stand_in.settings["compat_mode"])
                self.threads = ThreadPoolExecutor(stand_in.settings["num_threads"])

            def close(self) -> None:
                self.threads.shutdown()
                os.close(self.fd)

            def is_direct_io_supported(self) -> bool:
                return bool(stand_in.settings.get("auto_direct_io_read"))

            def pread(
                self, buf: Any, size: int | None = None, file_offset: int = 0, task_size: int | None = None
            ) -> IOFuture:
                if stand_in.driver_error:
                    raise RuntimeError(stand_in.driver_error)
                shown = getattr(buf, "__cuda_array_interface__", None) or buf.__array_interface__
                assert size is not None
                assert shown["shape"] == (size,)
                into = (ctypes.c_ubyte * size).from_address(shown["data"][0])
                if size < GDS_THRESHOLD:
                    done: Future[int] = Future()
                    done.set_result(read(self.fd, into, file_offset))
                    return IOFuture(done)
                return IOFuture(self.threads.submit(read, self.fd, into, file_offset))

        self.CuFile = CuFile
        self.defaults = SimpleNamespace(
            set=self._set, get=self._get, is_compat_mode_preferred=self._is_compat_mode_preferred
        )
        self.cufile_driver = SimpleNamespace(get=self._driver_get, libcufile_version=self._libcufile_version)

    def bounce_buffer_free(self) -> int:
        self.freed += 1
        return 0

    def _set(self, *config: Any) -> Any:
        changes = config[0] if len(config) == 1 else {config[0]: config[1]}
        before = {name: self.settings.get(name) for name in changes}
        self.settings.update(changes)
        return _Undo(self.settings, before)

    def _get(self, config_name: str) -> Any:
        return self.settings[config_name]

    def _is_compat_mode_preferred(self) -> bool:
        return self.settings["compat_mode"] is CompatMode.ON or self.cufile == (0, 0) or not self.udev

    def _driver_get(self, config_name: str) -> Any:
        return {"is_gds_available": self.gds}[config_name]

    def _libcufile_version(self) -> tuple[int, int]:
        return self.cufile


class _Undo(nullcontext[None]):
    """As a block of `with` it puts the settings back that were changed."""

    def __init__(self, settings: dict[str, Any], before: dict[str, Any]) -> None:
        super().__init__()
        self._settings, self._before = settings, before

    def __exit__(self, *_: object) -> None:
        self._settings.update(self._before)


def read(fd: int, into: Any, offset: int) -> int:
    """Fill it from there on. Raises RuntimeError as kvikio does."""
    done, view = 0, memoryview(into).cast("B")
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise RuntimeError(PLACE + str(error.strerror)) from None
        if not got:
            raise RuntimeError(PLACE + "EOF")
        done += got
    return done


def install(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> StandIn:
    """Put it where the reader will look for kvikio, and give it back."""
    monkeypatch.setitem(sys.modules, "kvikio", stand_in)
    for part in ("defaults", "cufile_driver"):
        monkeypatch.setitem(sys.modules, f"kvikio.{part}", getattr(stand_in, part))
    return stand_in


def opened(paths: list[Path], threads: int = 4) -> KvikioReader:
    """The reader, with another one for the host's memory."""
    return KvikioReader(paths, ThreadReader(paths, threads=2), threads=threads)
