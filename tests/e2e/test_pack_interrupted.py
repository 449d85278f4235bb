"""`pack` stopped on its way, by Ctrl-C or killed: no half-written store, and the next run works."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.program import assert_interrupted, ended, flashinfer_with, names_in, started, wait_until
from tests.plain_checkpoint import write_checkpoint

MOMENTS: dict[str, Callable[[list[Path]], bool]] = {
    "the first file begins": lambda files: any("dense" in f.name for f in files),
    "the first file is half full": lambda files: any("dense" in f.name and f.stat().st_size > 5e7 for f in files),
    "the second file begins": lambda files: any("neurons" in f.name for f in files),
}
"""What lies in the temporary directory when the signal is sent."""


def reached(folder: Path, moment: str) -> bool:
    try:
        return MOMENTS[moment]([file for made in folder.glob(".store.tmp-*") for file in made.iterdir()])
    except FileNotFoundError:  # renamed in between
        return False


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_leaves_nothing(moment: str, large: Path, tmp_path: Path) -> None:
    process = started("pack", large, tmp_path / "store")
    wait_until(lambda: reached(tmp_path, moment), process)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert_interrupted(done)
    assert done.stdout == ""
    assert names_in(tmp_path) == []


def test_ctrl_c_spares_the_store_that_was_to_be_replaced(large: Path, tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "checkpoint")
    assert flashinfer_with("pack", small, tmp_path / "store").returncode == 0
    before = names_in(tmp_path / "store")
    process = started("pack", large, tmp_path / "store", "--force")
    wait_until(lambda: reached(tmp_path, "the first file begins"), process)
    process.send_signal(signal.SIGINT)
    assert_interrupted(ended(process))
    assert names_in(tmp_path) == ["checkpoint", "store"]
    assert names_in(tmp_path / "store") == before


def test_what_a_killed_writer_leaves_is_removed_by_the_next(large: Path, tmp_path: Path) -> None:
    checkpoint, folder = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out"
    folder.mkdir()
    process = started("pack", large, folder / "store")
    wait_until(lambda: reached(folder, "the first file is half full"), process)
    process.kill()
    assert ended(process).returncode == -signal.SIGKILL
    assert names_in(folder) == [f".store.tmp-{process.pid}"]
    assert flashinfer_with("pack", checkpoint, folder / "store").returncode == 0
    assert names_in(folder) == ["store"]
