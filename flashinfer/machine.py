"""What this machine offers: memory that may be used, memory in use, cores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 128 * 1024


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
    """Bytes the kernel fetched from storage for this process (/proc/self/io), None where it does not say."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return None
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("read_bytes:")))


def usable_memory() -> int:
    """Bytes this process may grow to: what is available, and no more than its memory cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    return min(available + resident_bytes(), _cgroup_limit())


def _cgroup_limit() -> int:
    """The tightest limit from this process's cgroup up to the root (v1 and v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    limit = _NO_LIMIT
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (_V2, "memory.max") if not controllers else (_V1, "memory.limit_in_bytes")
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                text = "max"
            limit = min(limit, int(text) if text.isdigit() else _NO_LIMIT)
            if folder == root:
                break
    return limit


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
