"""One contender, one cap: a fresh process in a fresh cgroup with cold files, its report read line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from flashinfer.bench.cgroup import Group, fresh_group
from flashinfer.bench.compare.contenders import Contender
from flashinfer.bench.compare.disk import Disk
from flashinfer.bench.compare.launch import command_of, only_peers
from flashinfer.units import MIB

_DROP = Path("/proc/sys/vm/drop_caches")


@dataclass
class Run:
    """How one run went. Bytes and seconds; `tokens` and `device` are by decoded token.

    cap: None where there was none. first_token_s: from the start of the process, imports and loading among it.
    peak: anonymous, shared and kernel memory of the cgroup (without one: the most the
    process was resident); charged: with page cache. disk: bytes/s of the raw probe, just before the run and (ours)
    during it. end: what the contender says of itself. logits: `[tokens + 1, vocab]`, after the prompt and each token.
    """

    contender: str
    cap: int | None
    status: str = "failed"
    peak: int = 0
    charged: int | None = None
    load_s: float | None = None
    prompt_s: float | None = None
    first_token_s: float | None = None
    tokens: list[float] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    end: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    logits: npt.NDArray[np.float32] | None = None

    def take(self, line: dict[str, Any], after: float) -> None:
        """Note one line of the report, so many seconds after the process was started."""
        match line.pop("at"):
            case "loaded":
                self.load_s = line["seconds"]
            case "prompt":
                self.prompt_s, self.first_token_s = line["seconds"], after
            case "token":
                self.tokens.append(line["seconds"])
                self.device += [line["device_bytes"]] if line["device_bytes"] is not None else []
            case "refused":
                self.status, self.end = "refused", line
            case "end":
                self.status, self.end = "ok", line

    def to_json(self) -> dict[str, Any]:
        """All but the logits."""
        return {name: value for name, value in vars(self).items() if name != "logits"}


def may_drop_everything() -> bool:
    """Whether this user may drop the whole page cache."""
    return os.access(_DROP, os.W_OK)


def chill(files: Iterable[Path]) -> None:
    """Have what is read next come from the disk."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        _DROP.write_text("3")


def warm(files: Iterable[Path]) -> None:
    """Have what is read next come from the page cache."""
    for path in files:
        with path.open("rb") as file:
            while file.read(8 * MIB):
                pass


def compete(
    contender: Contender, cap: int | None, job: dict[str, Any], disk: Disk, *, timeout: float, grouped: bool = True
) -> Run:
    """Run the contender under a cap of so many bytes (None, or not `grouped`: without a limit of the kernel's).

    Raises:
        CgroupError: no cgroup can be made.
    """
    run, started = Run(contender.name, cap), time.perf_counter()
    run.disk.append(disk.probe())
    if contender.capped:
        chill(contender.files)
    else:
        warm(contender.files)
    with only_peers() as folder, _group(cap, grouped) as group:
        logits = folder / "logits.npy"
        asked = job | {"model": str(contender.model.resolve()), "cap": cap, "logits": str(logits)}
        command = command_of(contender, asked)
        watching = group.watched() if group else contextlib.nullcontext()
        with watching, (folder / "errors").open("w+", encoding="utf-8", errors="replace") as errors:
            code, late = _follow(group.command(command) if group else command, run, disk, errors, folder, timeout)
            errors.seek(0)
            run.error = "" if run.status in ("ok", "refused") else errors.read()[-2000:].strip()
        run.logits = np.load(logits) if logits.exists() else None
        _settle(run, group, code, late)
    run.wall_s = time.perf_counter() - started
    return run


@contextlib.contextmanager
def _group(cap: int | None, grouped: bool) -> Iterator[Group | None]:
    if not grouped:
        yield None
        return
    with fresh_group(cap) as group:
        yield group


def _settle(run: Run, group: Group | None, code: int, late: bool) -> None:
    if group is None:
        run.peak = run.end.get("peak_resident", 0)
    else:
        run.peak, run.charged = group.peak, group.most_charged()
    if group is not None and group.oom_kills():
        run.status = "OOM-killed"
    elif late:
        run.status = "timed out"
    elif code != 0:
        run.status = "failed"


def _follow(
    command: list[str], run: Run, disk: Disk, errors: IO[str], folder: Path, timeout: float
) -> tuple[int, bool]:
    """Start the command, read its report to the end, answer what it asks. Exit code, and whether it took too long."""
    late, started = threading.Event(), time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        for text in process.stdout:
            line = _parsed(text)
            if line.get("at") == "probe":
                run.disk.append(disk.probe())
                rate = harmonic_mean(run.disk)
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps({"rate": rate, "curves": disk.curves(rate)}), file=process.stdin, flush=True)
            elif line:
                run.take(line, time.perf_counter() - started)
    finally:
        timer.cancel()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if sys.exc_info()[0] is not None:
            process.kill()
        code = process.wait()
    return code, late.is_set()


def harmonic_mean(rates: list[float]) -> float:
    """The rate of equal amounts, one at each of these rates."""
    return len(rates) / sum(1 / rate for rate in rates)


def _parsed(text: str) -> dict[str, Any]:
    """The line, where it is one of ours: libraries may print, too."""
    with contextlib.suppress(ValueError):
        line = json.loads(text)
        return line if isinstance(line, dict) and "at" in line else {}
    return {}
