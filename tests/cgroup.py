"""Runs a command in a memory cgroup of exactly so many bytes, swap off (v1 and v2), and says what it took."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

import pytest

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
_NUMBERS = itertools.count()
_SAMPLING_SECONDS = 0.005
_PATIENCE = 120.0
_ENTER = 'echo $$ > "$0" && exec "$@"'
"""A shell that moves itself into the cgroup before the command begins, so that all of it is charged."""


@dataclass(frozen=True)
class Limited:
    """How a command ended. `peak` is the most anonymous, kernel and shared memory seen at one time, in bytes
    (page cache is left out: it gives way); `writing` is what happened while it wrote to stdout, from the first
    piece to the last: for `generate`, while it decoded."""

    returncode: int
    stdout: str
    stderr: str
    oom_kills: int
    peak: int
    writing: Pressure


@dataclass(frozen=True)
class Pressure:
    """What a cgroup that is too small suffers: how often the limit made the kernel reclaim, pages that had to be
    read to go on, pages that were read again after they had been reclaimed."""

    limit_hits: int
    major_faults: int
    refaults: int

    def __sub__(self, other: Pressure) -> Pressure:
        return Pressure(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class _Group:
    """One cgroup, of either version: the names of its files are all that differs."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version = path, version

    def limit(self, size: int) -> None:
        if self.version == 1:
            self._write("memory.limit_in_bytes", size)
            self._write("memory.swappiness", 0)
            if (self.path / "memory.memsw.limit_in_bytes").exists():
                self._write("memory.memsw.limit_in_bytes", size)
        else:
            self._write("memory.max", size)
            if (self.path / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)

    def in_use(self) -> int:
        """Anonymous, kernel and shared memory now."""
        stat = self._table("memory.stat")
        if self.version == 2:
            return stat["anon"] + stat["shmem"] + stat.get("kernel", 0)
        kernel = self.path / "memory.kmem.usage_in_bytes"
        return stat["rss"] + stat.get("shmem", 0) + (int(kernel.read_text()) if kernel.exists() else 0)

    def oom_kills(self) -> int:
        return self._table("memory.oom_control" if self.version == 1 else "memory.events").get("oom_kill", 0)

    def pressure(self) -> Pressure:
        stat = self._table("memory.stat")
        refaults = sum(value for key, value in stat.items() if key.startswith("workingset_refault"))
        return Pressure(self._limit_hits(), stat["pgmajfault"], refaults)

    def _limit_hits(self) -> int:
        if self.version == 1:
            return int((self.path / "memory.failcnt").read_text())
        return self._table("memory.events")["max"]

    def _table(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return {key: int(value) for key, value in lines}

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


def run_limited(
    command: Sequence[str], limit: int, *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Limited:
    """Run `command` in a fresh memory cgroup of `limit` bytes. Skips the test where none can be made."""
    with _group(limit) as group:
        shell = ["/bin/sh", "-c", _ENTER, str(group.path / "cgroup.procs"), *command]
        process = subprocess.Popen(
            shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env
        )
        try:
            with ThreadPoolExecutor() as watchers:
                peak = watchers.submit(_peak, group, process)
                stderr = watchers.submit(process.stderr.read)
                stdout, writing = _watched(group, process.stdout)
                process.wait(timeout=_PATIENCE)
        finally:
            process.kill()
            process.wait()
        return Limited(
            process.returncode, stdout.decode(), stderr.result().decode(), group.oom_kills(), peak.result(), writing
        )


def _peak(group: _Group, process: subprocess.Popen[bytes]) -> int:
    """The most the cgroup used until the process ended, which must be soon."""
    peak, give_up = 0, time.monotonic() + _PATIENCE
    while process.poll() is None:
        peak = max(peak, group.in_use())
        if time.monotonic() > give_up:
            process.kill()
        time.sleep(_SAMPLING_SECONDS)
    return peak


def _watched(group: _Group, stdout: IO[bytes]) -> tuple[bytes, Pressure]:
    """All of a process's output, and the pressure between the first piece of it and the last."""
    pieces, seen = [], [group.pressure()]
    while piece := os.read(stdout.fileno(), 1 << 16):
        seen.append(group.pressure())
        pieces.append(piece)
    return b"".join(pieces), seen[-1] - seen[min(1, len(seen) - 1)]


def drop_page_cache(folder: Path) -> None:
    """Make what lies in `folder` come from the disk again, where the kernel takes such hints."""
    for path in folder.iterdir():
        if hasattr(os, "posix_fadvise") and path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@contextlib.contextmanager
def _group(limit: int) -> Iterator[_Group]:
    group = _make(f"flashinfer-test-{os.getpid()}-{next(_NUMBERS)}")
    try:
        try:
            group.limit(limit)
        except OSError as e:
            pytest.skip(f"{group.path} takes no limit: {e.strerror}")
        yield group
    finally:
        _remove(group.path)


def _make(name: str) -> _Group:
    """A new cgroup below one that may be written to: this process's own, its parent, or the root."""
    tried = []
    for version, parent in _parents():
        try:
            if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
            path = parent / name
            path.mkdir()
        except OSError as e:
            tried.append(f"{parent}: {e.strerror}")
            continue
        return _Group(path, version)
    pytest.skip(f"no memory cgroup can be made ({'; '.join(tried) or 'there are none here'})")


def _parents() -> Iterator[tuple[int, Path]]:
    own = Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, V1) if controllers else (2, V2)
        here = root / path.lstrip("/")
        names = "memory.limit_in_bytes" if version == 1 else "cgroup.subtree_control"
        yield from ((version, p) for p in dict.fromkeys((here, here.parent, root)) if (p / names).exists())


def _remove(path: Path) -> None:
    """The kernel may still hold the cgroup for a moment after its last process."""
    for _ in range(100):
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return
