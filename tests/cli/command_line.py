"""Runs the command line as its users do: as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(
    *arguments: str, path: Path = ROOT, module: str = "flashinfer", cwd: Path | None = None, site: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` with `path` first on the import path; without `site`, the standard library alone."""
    return subprocess.run(
        [sys.executable, *([] if site else ["-S"]), "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(path), "COLUMNS": "100", "NO_COLOR": "1"},
        cwd=cwd,
        timeout=60,
    )
