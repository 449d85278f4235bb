"""Reads straight to a GPU's memory, by kvikio: past the host's memory where the system has GPUDirect Storage.

kvikio (https://docs.rapids.ai/api/kvikio) is imported when a reader is opened. Where there is no GPUDirect Storage, it
reads to memory of its own and copies from there: its compatibility mode.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import re
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.config import BOUNCE_BUFFER, FILE_ALIGNMENT
from flashinfer.errors import PlatformError, StoreError, StoreReadError
from flashinfer.io.buffers import AlignedBuffer
from flashinfer.io.files import TRUNCATED
from flashinfer.io.reader import DeviceMemory, Extents, Pending, Reader, ReadStats, check_device_request

INSTALL = "pip install 'flashinfer-offload[gds]'"


@dataclass(frozen=True)
class Kvikio:
    """The library, and how it reads here. `no_gds` says why not with GPUDirect Storage, None where it does."""

    module: Any
    no_gds: str | None

    @property
    def how(self) -> str:
        """For people."""
        name = f"kvikio {self.module.__version__}"
        if self.no_gds is None:
            return f"{name}, GPUDirect Storage"
        return f"{name}, compatibility mode (through the host's memory), because {self.no_gds}"


def load_kvikio(trial: Path) -> Kvikio:
    """The library, once it has read from that file to the host's memory, which takes the GPU's driver already.

    Raises:
        PlatformError: it is not installed, does not load, or does not run with this driver; or there is no GPUDirect
            Storage, and KVIKIO_COMPAT_MODE forbids the compatibility mode. StoreError: the file cannot be opened.
    """
    if importlib.util.find_spec("kvikio") is None:
        raise PlatformError(f"no kvikio here: it is not installed; {INSTALL}")
    try:
        module = importlib.import_module("kvikio")
        for part in ("defaults", "cufile_driver"):
            importlib.import_module(f"kvikio.{part}")
    except Exception as error:  # a library of its own that is not there: an ImportError, an OSError or one of its own
        raise PlatformError(f"no kvikio here: it does not load: {_reason(error)}; {INSTALL}") from error
    _try(module, trial)
    found = Kvikio(module, _no_gds(module))
    if found.no_gds is not None and module.defaults.get("compat_mode") == module.CompatMode.OFF:
        raise PlatformError(
            f"KVIKIO_COMPAT_MODE forbids the compatibility mode, and there is no GPUDirect Storage here: {found.no_gds}"
        )
    return found


def _try(module: Any, path: Path) -> None:
    """One small read. Raises PlatformError."""
    file = _open(module, path, compat=True)
    with AlignedBuffer(FILE_ALIGNMENT) as buffer, contextlib.closing(file):
        try:
            file.pread(buffer.array, FILE_ALIGNMENT, 0).get()
        except Exception as error:
            reason, known = _reason(error), _driver()
            if reason == TRUNCATED or "POSIX" in reason:  # it runs, and what is wrong with the file is said in time
                return
            if known is None:
                raise PlatformError(f"no kvikio here: there is no NVIDIA driver ({reason}); install it") from error
            raise PlatformError(
                f"kvikio {module.__version__} does not run with this driver, which knows CUDA {known}: {reason}; "
                "update the driver"
            ) from error


def _open(module: Any, path: Path, *, compat: bool) -> Any:
    """A `kvikio.CuFile`, in the compatibility mode or as kvikio chooses. Without GPUDirect Storage that is not left to
    it: it would let cuFile find a way around, and that takes memory which nobody bounds.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        with module.defaults.set("compat_mode", module.CompatMode.ON) if compat else contextlib.nullcontext():
            return module.CuFile(path, "r")
    except Exception as error:
        raise StoreError(f"cannot open {path}: {_reason(error)}; check the path and its permissions") from error


def _driver() -> str | None:
    """The newest CUDA the driver knows; None where there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _no_gds(module: Any) -> str | None:
    """Why reads do not go past the host's memory; None where they do, as kvikio says."""
    defaults, driver = module.defaults, module.cufile_driver
    if defaults.get("compat_mode") == module.CompatMode.ON:
        return "KVIKIO_COMPAT_MODE asks for it"
    if driver.libcufile_version() == (0, 0):
        return "libcufile cannot be loaded"
    if defaults.get("compat_mode") == module.CompatMode.AUTO and defaults.is_compat_mode_preferred():
        return "/run/udev cannot be read, or this is WSL"
    return None if driver.get("is_gds_available") else "the kernel module nvidia-fs is not loaded"


def _reason(error: Exception) -> str:
    """What a message of kvikio's says, without the place in its source."""
    text = " ".join(str(error).split())
    return TRUNCATED if text.endswith("EOF") else re.sub(r"^.* at: \S+:\d+: ", "", text)


class KvikioReader:
    """A `DeviceReader` (see `io.reader`): what goes to a device's memory is read by kvikio, all else by `host`.

    kvikio's threads, and how much memory each of them reads through, are settings of the process, and are set here.

    Args:
        paths: the files, numbered by their place here.
        host: a reader of the same files; it is closed with this one.
        threads: reads to a device in flight at most.

    Raises:
        PlatformError: as `load_kvikio`. StoreError: a file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], host: Reader, *, threads: int) -> None:
        library = load_kvikio(paths[0])
        module = library.module
        module.defaults.set({"num_threads": threads, "bounce_buffer_size": BOUNCE_BUFFER, "auto_direct_io_read": True})
        self._host, self._free, self._closed = host, module.bounce_buffer_free, False
        self._paths = [str(path) for path in paths]
        self._files: list[Any] = []
        self._under_way: list[KvikioPending] = []
        # whoever forgets to close must not leave reads under way: kvikio writes to the target whoever has it then
        weakref.finalize(self, _release, self._under_way, self._files, self._free).atexit = False
        try:
            for path in paths:
                self._files.append(_open(module, path, compat=library.no_gds is not None))
        except BaseException:
            _release(self._under_way, self._files, self._free)
            raise
        self.alignment, self.stats = host.alignment, host.stats
        self.direct = host.direct and all(file.is_direct_io_supported() for file in self._files)
        self.note = f"{host.note}; to the device {threads} threads of {library.how}"

    def submit(self, file: int, extents: Extents, target: npt.NDArray[np.uint8]) -> Pending:
        """As `Reader.submit`."""
        return self._host.submit(file, extents, target)

    def submit_to_device(self, file: int, extents: Extents, target: DeviceMemory) -> KvikioPending:
        """As `DeviceReader.submit_to_device`. Short reads kvikio may do at once, before this returns."""
        if self._closed:
            raise ValueError("the reader is closed")
        check_device_request(extents, target)
        self.stats.count(extents)
        return KvikioPending(self._files[file], self._paths[file], extents, target, self.stats, self._under_way)

    def close(self) -> None:
        """As `Reader.close`."""
        self._closed = True
        _release(self._under_way, self._files, self._free)
        self._host.close()


class KvikioPending:
    """Reads of one submit. Until somebody has waited for them, `under_way` keeps this, and this the target."""

    def __init__(
        self,
        file: Any,
        path: str,
        extents: Extents,
        target: DeviceMemory,
        stats: ReadStats,
        under_way: list[KvikioPending],
    ) -> None:
        self._path, self._stats, self._under_way = path, stats, under_way
        self._target: DeviceMemory = target
        self._error: StoreReadError | None = None
        self._left: deque[tuple[int, int, Callable[[], int]]] = deque()
        under_way.append(self)
        columns = (extents.offsets.tolist(), extents.lengths.tolist(), extents.targets.tolist())
        for offset, length, place in zip(*columns, strict=True):
            self._left.append((offset, length, _start(file, target[place : place + length], length, offset)))

    def wait(self) -> None:
        """As `Pending.wait`."""
        started = time.perf_counter()
        try:
            while self._left:
                offset, length, result = self._left[0]
                reason = _failure(result, length)
                if reason is not None and self._error is None:
                    self._error = StoreReadError(self._path, offset, length, reason)
                # a result is told once: where Ctrl-C strikes before this line, asking again fails, which is safe
                self._left.popleft()
        finally:
            self._stats.seconds_waiting += time.perf_counter() - started
        self._target = None
        if self in self._under_way:
            self._under_way.remove(self)
        if self._error is not None:
            raise self._error


def _start(file: Any, target: DeviceMemory, length: int, offset: int) -> Callable[[], int]:
    """A read on its way; the result blocks until it has ended, and is how many bytes were read."""
    try:
        result: Callable[[], int] = file.pread(target, length, offset).get
    except Exception as error:  # kvikio does short reads at once
        return partial(_raise, error.with_traceback(None))  # its frames would keep the target alive
    return result


def _raise(error: Exception) -> int:
    raise error


def _failure(result: Callable[[], int], length: int) -> str | None:
    """What went wrong with a read of so many bytes, once it has ended."""
    try:
        return None if result() == length else TRUNCATED
    except Exception as error:
        return _reason(error)


def _release(under_way: list[KvikioPending], files: list[Any], free: Callable[[], object]) -> None:
    """Wait for what is in flight, close the files, give back kvikio's memory. Goes on where an interrupted call
    stopped."""
    while under_way:
        with contextlib.suppress(StoreReadError):
            under_way[-1].wait()
    if files:
        while files:
            files.pop().close()
        with contextlib.suppress(Exception):  # without the device's context it goes with the process
            free()
