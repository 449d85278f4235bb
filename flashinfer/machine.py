"""What this machine offers: memory that may be used, memory in use, cores."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from flashinfer.errors import CapTooLargeError
from flashinfer.units import format_size, parse_cap_size

_OWN_CGROUP = Path("/proc/self/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_LIMIT_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_NO_LIMIT = 1 << 60
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 128 * 1024
_READ_BYTES = b"\nread_bytes: "


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most this process was ever resident (VmHWM on Linux, ru_maxrss elsewhere)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_bytes_read() -> int | None:
    """Bytes the kernel fetched from storage for this process, threads included; None where it does not say.

    Pages of the program and of its libraries count like any others. Asked twice in every step: 3 us each time.
    """
    fd = _own_io(os.getpid())
    if fd is None:
        return None
    text = os.pread(fd, 4096, 0)
    at = text.index(_READ_BYTES) + len(_READ_BYTES)
    return int(text[at : text.index(b"\n", at)])


@functools.cache
def _own_io(process: int) -> int | None:
    """The kernel's counts for this process, open until it ends: opening takes longer than reading."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(fd, 1, 0)  # it may open and yet not be readable
        except OSError:
            os.close(fd)
            raise
        return fd
    return None


def usable_memory() -> int:
    """Bytes this process may grow to: what is available, and no more than its memory cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    return min([available + resident_bytes(), *(limit.bytes for limit in memory_limits())])


def usable_reason() -> str:
    """`usable_memory` for people, and what bounds it."""
    usable = usable_memory()
    tight = [limit.file for limit in memory_limits() if limit.bytes <= usable]
    return f"this process may use {format_size(usable)}" + (f" (the limit in {tight[0]})" if tight else "")


def memory_cap(text: int | str) -> int:
    """A `--memory` cap in bytes: a size, or a share of the usable memory (`50%`).

    Raises:
        ValueError: no size, nothing, or a share above 100 %.
        CapTooLargeError: more than this process may use; says how much that is.
    """
    usable = usable_memory()
    size = parse_cap_size(text, usable)
    if size - usable >= mmap.PAGESIZE:  # the kernel keeps limits in whole pages
        raise CapTooLargeError(
            f"a memory cap of {format_size(size)} cannot be kept: {usable_reason()}; lower the cap, or free memory",
            usable,
        )
    return size


@dataclass(frozen=True)
class MemoryLimit:
    """A cgroup's limit: which file says it, of which version, and bytes the cgroup uses now (None: not told)."""

    file: Path
    version: int
    bytes: int
    used: int | None


def memory_limits() -> list[MemoryLimit]:
    """The memory limits from this process's cgroup up to the root (v1 and v2), the tightest first."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, _V1) if controllers else (2, _V2)
        name, used = _LIMIT_FILES[version]
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            limit = _number_in(folder / name)
            if limit is not None and limit < _NO_LIMIT:
                limits.append(MemoryLimit(folder / name, version, limit, _number_in(folder / used)))
            if folder == root:
                break
    return sorted(limits, key=lambda limit: limit.bytes)


def _number_in(file: Path) -> int | None:
    """The number in a file of the kernel; None where there is no file, or a word (`max`)."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def processor_name() -> str:
    """The processor as its maker calls it; `unknown` where the system does not tell."""
    for line in cpu_info():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_info() -> list[str]:
    """The lines of /proc/cpuinfo; none where it is missing."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []


def compute_threads() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def return_freed_memory() -> None:
    """Make the allocator of this process give large blocks back to the system when they are freed.

    glibc does so too at first, but raises what it calls large (to 32 MiB) as such blocks come and go, and then
    keeps them, in one arena per thread: measured, 20 to 130 MiB that are in no plan. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
