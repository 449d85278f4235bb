"""The kernels compile for cards that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

ROOT = Path(__file__).parents[2]
PRODUCTS = ["linear", "decide", "tiles", "coefficients", "outputs"]
NAMES = ["linear", "decide", "norm", "rotate", "append", "tiles", "combine", "copy", "coefficients", "outputs", "fold"]


def test_the_kernels_compile(tmp_path: Path) -> None:
    """One kernel however many tokens, tiles and rows, of one token with the widest loads."""
    here = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.backend.compile_kernels", "90", "nf4"]
    done = subprocess.run(command, env=here, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in done.stdout.splitlines()]
    one, other, some, more = (calls[i : i + len(NAMES)] for i in range(0, len(calls), len(NAMES)))
    assert [[name[1:].removesuffix("_kernel") for name, *_ in part] for part in (one, other, some, more)] == 4 * [NAMES]
    assert one == other
    assert some == more
    assert all(wide == "True" for name, _, wide in one if name[1:].removesuffix("_kernel") in PRODUCTS)
