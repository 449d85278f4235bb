"""Runs a command in a memory cgroup of exactly so many bytes, swap off (v1 and v2), and says what it took.

Where no cgroup can be made, the command runs without, and what it took is the most its process was ever resident."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from flashinfer.bench.cgroup import Group, Pressure, fresh_group
from flashinfer.errors import CgroupError

_SAMPLING_SECONDS = 0.005
_PATIENCE = 120.0


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


class _Alone:
    """What stands for a cgroup where none can be made: the process is watched, and not limited."""

    process = 0

    def command(self, command: list[str]) -> list[str]:
        return command

    def in_use(self) -> int:
        """The most the process was ever resident (VmHWM); 0 before it began, and once it has ended."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process}/status").read_text().splitlines():
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
            group.command([*command]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env,
        )  # fmt: skip
        if isinstance(group, _Alone):
            group.process = process.pid
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


def _peak(group: Group | _Alone, process: subprocess.Popen[bytes]) -> int:
    """The most that was used until the process ended, which must be soon."""
    peak, give_up = 0, time.monotonic() + _PATIENCE
    while process.poll() is None:
        peak = max(peak, group.in_use())
        if time.monotonic() > give_up:
            process.kill()
        time.sleep(_SAMPLING_SECONDS)
    return peak


def _watched(group: Group | _Alone, stdout: IO[bytes]) -> tuple[bytes, list[Pressure | None]]:
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
def _group(limit: int) -> Iterator[Group | _Alone]:
    with contextlib.ExitStack() as stack:
        try:
            group: Group | _Alone = stack.enter_context(fresh_group(limit))
        except CgroupError:
            if not Path("/proc/self/status").exists():
                pytest.skip("no memory cgroup can be made, and the system does not say what a process takes")
            group = _Alone()
        yield group
