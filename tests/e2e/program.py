"""The program as its user meets it: started as a process, watched, interrupted, and held to one line per error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer
from tests.cli.command_line import ROOT

DEMO = Path(flashinfer.__file__).parent / "_demo"
PROMPT = "Once upon a time"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
_PATIENCE = 60.0


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "flashinfer", *map(str, arguments)]


def flashinfer_with(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end; `options` are those of `subprocess.run`, by default with nothing on stdin."""
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    return subprocess.run(
        command(*arguments), capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=_PATIENCE, **options
    )


def started(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """A process that heeds Ctrl-C even where the tests themselves were started in the background."""
    return subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT, bufsize=0, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a started process."""
    try:
        out, err = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Return as soon as the condition holds, or the process has ended."""
    give_up = time.monotonic() + _PATIENCE
    while not condition() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.001)


def assert_failed(done: subprocess.CompletedProcess[str], *parts: str, status: int = 1) -> None:
    """One line on stderr that holds every part, nothing on stdout, no traceback."""
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("flashinfer: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "bug" not in done.stderr
    for part in parts:
        assert part in done.stderr


def assert_interrupted(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (1, "flashinfer: interrupted\n"), done


def names_in(folder: Path) -> list[str]:
    """Everything that lies there, hidden or not."""
    return sorted(path.name for path in folder.iterdir())
