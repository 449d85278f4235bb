"""A memory cgroup of exactly so many bytes, swap off (v1 and v2), and what happened in it. The tests use it, too."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from flashinfer.errors import CgroupError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
ENTER = 'echo $$ > "$0" && exec "$@"'
"""A shell that moves itself into the cgroup before the command begins, so that all of it is charged."""
SAMPLING_SECONDS = 0.02
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Pressure:
    """What a cgroup that is too small suffers: how often the limit made the kernel reclaim, pages that had to be
    read to go on, pages that were read again after they had been reclaimed."""

    limit_hits: int
    major_faults: int
    refaults: int

    def __sub__(self, other: Pressure) -> Pressure:
        return Pressure(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Group:
    """One cgroup, of either version: the names of its files are all that differs."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version = path, version
        self.peak = 0
        """The most anonymous, shared and kernel memory seen at one time while watched, in bytes."""

    def command(self, command: list[str]) -> list[str]:
        """The same command, run inside."""
        return ["/bin/sh", "-c", ENTER, str(self.path / "cgroup.procs"), *command]

    def limit(self, size: int) -> None:
        """Allow so many bytes, and no swap."""
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
        """Anonymous, shared and kernel memory now. Page cache is left out: it gives way."""
        stat = self._table("memory.stat")
        if self.version == 2:
            return stat["anon"] + stat["shmem"] + stat.get("kernel", 0)
        kernel = self.path / "memory.kmem.usage_in_bytes"
        return stat["rss"] + stat.get("shmem", 0) + (int(kernel.read_text()) if kernel.exists() else 0)

    def most_charged(self) -> int | None:
        """The most that was ever charged, page cache included; None where the kernel does not say."""
        file = self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def oom_kills(self) -> int:
        """Processes the kernel killed in it for want of memory."""
        return self._table("memory.oom_control" if self.version == 1 else "memory.events").get("oom_kill", 0)

    def pressure(self) -> Pressure:
        """All of it since the cgroup was made."""
        stat = self._table("memory.stat")
        refaults = sum(value for key, value in stat.items() if key.startswith("workingset_refault"))
        return Pressure(self._limit_hits(), stat["pgmajfault"], refaults)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Keep `peak` while the block runs."""
        over = threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLING_SECONDS):
                self.peak = max(self.peak, self.in_use())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield
        finally:
            over.set()
            sampler.join()

    def _limit_hits(self) -> int:
        if self.version == 1:
            return int((self.path / "memory.failcnt").read_text())
        return self._table("memory.events")["max"]

    def _table(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return {key: int(value) for key, value in lines}

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


@contextlib.contextmanager
def fresh_group(limit: int | None) -> Iterator[Group]:
    """A new cgroup of `limit` bytes (None: without a limit), removed at the end. Raises CgroupError."""
    group = _make(f"flashinfer-{os.getpid()}-{next(_NUMBERS)}", limit)
    try:
        yield group
    finally:
        _remove(group.path)


def _make(name: str, limit: int | None) -> Group:
    """A new cgroup that takes the limit, below one that may be written to: this process's own, its parent, or the
    root."""
    tried = []
    for version, parent in _parents():
        try:
            if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
            group = Group(parent / name, version)
            group.path.mkdir()
        except OSError as e:
            tried.append(f"{parent}: {e.strerror}")
            continue
        try:
            if limit is not None:
                group.limit(limit)
        except OSError as e:
            tried.append(f"{group.path} takes no limit: {e.strerror}")
            _remove(group.path)
            continue
        return group
    raise CgroupError(f"no memory cgroup can be made here ({'; '.join(tried) or 'there are none'}); try as root")


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
