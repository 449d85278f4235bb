"""One contender, one cap: a fresh process in a fresh cgroup with a cold page cache, its report read line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .cgroup import Group, fresh_group

ROOT = Path(__file__).resolve().parents[2]
_DROP = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Contender:
    """Who runs: a module of this package, under some Python, on a model made for it."""

    name: str
    module: str
    model: Path
    python: str = sys.executable
    comparable: bool = True
    """Whether its logits should be ours: it computes the same function of the same weights."""

    @property
    def files(self) -> list[Path]:
        """What it reads."""
        return [p for p in self.model.iterdir() if p.is_file()] if self.model.is_dir() else [self.model]


@dataclass
class Run:
    """How one run went. Bytes and seconds; `tokens` and `device` are by decoded token.

    peak: anonymous, shared and kernel memory of the cgroup; charged: with page cache. disk: bytes/s of the raw probe,
    just before the run and (ours) during it. end: what the contender says of itself.
    """

    contender: str
    cap: int
    status: str = "failed"
    peak: int = 0
    charged: int | None = None
    load_s: float | None = None
    prompt_s: float | None = None
    tokens: list[float] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    end: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    logits: npt.NDArray[np.float32] | None = None

    def take(self, line: dict[str, Any]) -> None:
        """Note one line of the report."""
        match line.pop("at"):
            case "loaded":
                self.load_s = line["seconds"]
            case "prompt":
                self.prompt_s = line["seconds"]
            case "token":
                self.tokens.append(line["seconds"])
                self.device.append(line["device_bytes"])
            case "refused":
                self.status, self.end = "refused", line
            case "end":
                self.status, self.end = "ok", line

    def to_json(self) -> dict[str, Any]:
        """All but the logits."""
        return {name: value for name, value in vars(self).items() if name != "logits"}


@dataclass(frozen=True)
class Disk:
    """The raw disk: a probe of its rate, and the curves that a rate (bytes/s) stands for."""

    probe: Callable[[], float]
    curves: Callable[[float], dict[str, dict[str, float]]]


def may_drop_everything() -> bool:
    """Whether this user may drop the whole page cache."""
    return os.access(_DROP, os.W_OK)


def chill(files: Iterable[Path]) -> None:
    """Have what is read next come from the disk."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        _DROP.write_text("3")


def compete(contender: Contender, cap: int, job: dict[str, Any], disk: Disk, *, timeout: float) -> Run:
    """Run the contender under a cap of so many bytes. Raises NoCgroupError."""
    run, started = Run(contender.name, cap), time.perf_counter()
    run.disk.append(disk.probe())
    chill(contender.files)
    with tempfile.TemporaryDirectory() as folder, fresh_group(cap) as group:
        logits = Path(folder) / "logits.npy"
        asked = job | {"model": str(contender.model), "cap": cap, "logits": str(logits)}
        command = [contender.python, "-m", f"benchmarks.peers.{contender.module}", json.dumps(asked)]
        with group.watched(), tempfile.TemporaryFile("w+") as errors:
            code, late = _follow(group.command(command), run, disk, errors, timeout)
            errors.seek(0)
            run.error = "" if run.status in ("ok", "refused") else errors.read()[-2000:].strip()
        run.logits = np.load(logits) if logits.exists() else None
        _settle(run, group, code, late)
    run.wall_s = time.perf_counter() - started
    return run


def _settle(run: Run, group: Group, code: int, late: bool) -> None:
    run.peak, run.charged = group.peak, group.most_charged()
    if group.oom_kills():
        run.status = "OOM-killed"
    elif late:
        run.status = "timed out"
    elif code != 0:
        run.status = "failed"


def _follow(command: list[str], run: Run, disk: Disk, errors: IO[str], timeout: float) -> tuple[int, bool]:
    """Start the command, read its report to the end, answer what it asks. Exit code, and whether it took too long."""
    late = threading.Event()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", cwd=ROOT
    )

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in process.stdout:
            line = _parsed(text)
            if line.get("at") == "probe":
                run.disk.append(disk.probe())
                rate = len(run.disk) / sum(1 / r for r in run.disk)
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps({"rate": rate, "curves": disk.curves(rate)}), file=process.stdin, flush=True)
            elif line:
                run.take(line)
    finally:
        timer.cancel()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if sys.exc_info()[0] is not None:
            process.kill()
        code = process.wait()
    return code, late.is_set()


def _parsed(text: str) -> dict[str, Any]:
    """The line, where it is one of ours: libraries may print, too."""
    with contextlib.suppress(ValueError):
        line = json.loads(text)
        return line if isinstance(line, dict) and "at" in line else {}
    return {}
