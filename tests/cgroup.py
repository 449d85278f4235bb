"""Runs a command in a memory cgroup of exactly so many bytes, swap off (v1 and v2), and says what it took.

Where no cgroup can be made, the command runs without, and what it took is the most its process was ever resident."""

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
_ANY = 1 << 30
_ENTER = 'echo $$ > "$0" && exec "$@"'
"""A shell that moves itself into the cgroup before the command begins, so that all of it is charged."""


@dataclass(frozen=True)
class Limited:
    """How a command ended. `peak` is the most anonymous, kernel and shared memory seen at one time, in bytes
    (page cache is left out: it gives way); `writing` is what happened while it wrote to stdout, from the first of
    the `pieces` to the last: for `generate`, while it decoded.

    Without a cgroup `peak` is VmHWM, and `writing` None."""

    returncode: int
    stdout: str
    stderr: str
    oom_kills: int
    peak: int
    pieces: int
    writing: Pressure | None


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
        self.enter = ["/bin/sh", "-c", _ENTER, str(path / "cgroup.procs")]

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

    def in_use(self, process: int) -> int:
        """Anonymous, kernel and shared memory now, of every process in it."""
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


class _Alone:
    """What stands for a cgroup where none can be made: the process is watched, and not limited."""

    enter: Sequence[str] = ()

    def in_use(self, process: int) -> int:
        """The most the process was ever resident (VmHWM); 0 once it has ended."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0

    def oom_kills(self) -> int:
        return 0

    def pressure(self) -> None:
        return None


def run_limited(
    command: Sequence[str], limit: int, *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Limited:
    """Run `command` in a fresh memory cgroup of `limit` bytes, or without one where none can be made. Skips the test
    where there is no way to say what it takes."""
    with _group(limit) as group:
        process = subprocess.Popen(
            [*group.enter, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env,
        )  # fmt: skip
        try:
            with ThreadPoolExecutor() as watchers:
                peak = watchers.submit(_peak, group, process)
                stderr = watchers.submit(process.stderr.read)
                stdout, seen = _watched(group, process.stdout)
                process.wait(timeout=_PATIENCE)
        finally:
            process.kill()
            process.wait()
        kills = group.oom_kills()
    first, last = seen[min(1, len(seen) - 1)], seen[-1]
    return Limited(
        process.returncode,
        stdout.decode(),
        stderr.result().decode(),
        oom_kills=kills,
        peak=peak.result(),
        pieces=len(seen) - 1,
        writing=None if first is None or last is None else last - first,
    )


def _peak(group: _Group | _Alone, process: subprocess.Popen[bytes]) -> int:
    """The most that was used until the process ended, which must be soon."""
    peak, give_up = 0, time.monotonic() + _PATIENCE
    while process.poll() is None:
        peak = max(peak, group.in_use(process.pid))
        if time.monotonic() > give_up:
            process.kill()
        time.sleep(_SAMPLING_SECONDS)
    return peak


def _watched(group: _Group | _Alone, stdout: IO[bytes]) -> tuple[bytes, list[Pressure | None]]:
    """All of a process's output; the pressure at the start, and after each piece of it."""
    pieces, seen = [], [group.pressure()]
    while piece := os.read(stdout.fileno(), 1 << 16):
        seen.append(group.pressure())
        pieces.append(piece)
    return b"".join(pieces), seen


def drop_page_cache(folder: Path) -> None:
    """Make what lies in `folder` come from the disk again, where the kernel takes such hints."""
    for path in folder.iterdir():
        if hasattr(os, "posix_fadvise") and path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@contextlib.contextmanager
def _group(limit: int) -> Iterator[_Group | _Alone]:
    group = _make(f"flashinfer-test-{os.getpid()}-{next(_NUMBERS)}")
    if group is None:
        if not Path("/proc/self/status").exists():
            pytest.skip("no memory cgroup can be made, and the system does not say what a process takes")
        yield _Alone()
        return
    try:
        group.limit(limit)
        yield group
    finally:
        _remove(group.path)


def _make(name: str) -> _Group | None:
    """A new cgroup that takes a limit, below one that may be written to: this process's own, its parent, or the
    root. None where there is none."""
    for version, parent in _parents():
        group = _Group(parent / name, version)
        try:
            if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
            group.path.mkdir()
        except OSError:
            continue
        try:
            group.limit(_ANY)
        except OSError:
            _remove(group.path)
            continue
        return group
    return None


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
