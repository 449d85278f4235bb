"""fio beside our reader: the same file, size of read and reads in flight, as one `Slice`.

With io_uring it is one job that keeps so many reads in flight; with threads, so many jobs (threads of one process)
that each have one (`psync`). In order, each such job has its own share of the file. Reads are direct; everything else
is as fio does by itself: no registered buffers or files, no polling. Its CPU time is that of its jobs, from its own
report, and so are its percentiles (clat: from a read's submission until its completion is seen).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import randrange
from typing import Any

from flashinfer.bench.io_figures import Combination, Slice
from flashinfer.errors import PlatformError

RAMP_MS = 250
"""It reads so long before its clock starts: the first read into each of its buffers pays for page faults, and ours were
touched beforehand. (Measured, 256 reads of 1 MiB in flight: 0.22 CPU s/GB without, 0.05 with.)"""
PATIENCE = 60.0
"""Seconds beyond its time after which fio is given up."""


def find_fio() -> str | None:
    """The program, None where it is not installed."""
    return shutil.which("fio")


@dataclass(frozen=True)
class Fio:
    """An installed fio, and the file it reads."""

    program: str
    path: Path

    def version(self) -> str:
        """As it calls itself. Raises PlatformError: it does not run."""
        return self._run(["--version"], PATIENCE).strip()

    def slice(self, c: Combination, seconds: float, more: Sequence[str] = ()) -> Slice:
        """Read that combination for so many seconds; `more` options go after ours. Raises PlatformError: fio does not
        run, or reports an error."""
        said = self._run([*arguments(self.path, c, seconds), *more, "--output-format=json"], seconds + PATIENCE)
        return as_slice(json.loads(said[said.index("{") :]), c.chunk)

    def _run(self, arguments: list[str], timeout: float) -> str:
        try:
            done = subprocess.run(
                [self.program, *arguments], capture_output=True, text=True, check=False, timeout=timeout
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PlatformError(f"{self.program} does not run: {error}; measure without it (--no-fio)") from error
        if done.returncode:
            why = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
            raise PlatformError(f"{self.program} failed: {why}; measure without it (--no-fio)")
        return done.stdout


def arguments(path: Path, c: Combination, seconds: float) -> list[str]:
    """fio's job. The place where reads in order begin is drawn, so that no cache below us knows it."""
    size = path.stat().st_size
    jobs = 1 if c.reader == "io_uring" else c.threads
    job = [
        "--name=read", f"--filename={str(path).replace(':', chr(92) + ':')}", "--readonly", "--direct=1", "--thread",
        "--group_reporting", f"--bs={c.chunk}", f"--ioengine={'io_uring' if c.reader == 'io_uring' else 'psync'}",
        f"--iodepth={c.threads if jobs == 1 else 1}", f"--numjobs={jobs}", "--time_based",
        f"--ramp_time={RAMP_MS}ms", f"--runtime={max(1, math.ceil(seconds * 1000))}ms", "--percentile_list=50:99",
    ]  # fmt: skip
    if c.pattern == "random":
        return [*job, "--rw=randread", "--norandommap", "--randrepeat=0"]
    share = size // jobs // c.chunk * c.chunk
    if share < c.chunk:
        return [*job, "--rw=read"]
    begin = randrange(share // c.chunk // 2 + 1) * c.chunk
    return [*job, "--rw=read", f"--offset={begin}", f"--offset_increment={share}", f"--size={share - begin}"]


def as_slice(report: dict[str, Any], chunk: int) -> Slice:
    """What fio's JSON says of its only group of jobs, which made reads of `chunk` bytes.

    Reads are counted by their bytes: its own count leaves out those that were under way when its clock started. The
    shares of CPU time are of the sum of its jobs' run times, which is what `job_runtime` is in a group.
    """
    job = report["jobs"][0]
    read = job["read"]
    latency = read["clat_ns"]["percentile"]
    return Slice(
        bytes=read["io_bytes"],
        reads=read["io_bytes"] // chunk,
        seconds=read["runtime"] / 1000,
        cpu_seconds=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
        p50_s=latency["50.000000"] / 1e9,
        p99_s=latency["99.000000"] / 1e9,
    )
