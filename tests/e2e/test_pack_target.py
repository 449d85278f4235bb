"""Where `pack` cannot write: the target is taken, the disk is full, permission is missing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.program import ENVIRONMENT, assert_failed, command, flashinfer_with, names_in
from tests.plain_checkpoint import write_checkpoint

MOUNTED = 'mount -t tmpfs -o "$0" tmpfs "$1" || exit 99; folder=$1; shift; "$@"; code=$?; ls -A "$folder"; exit $code'
"""Runs a command with a small disk of its own; what is left on it goes to stdout."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def pack_on_a_disk(options: str, checkpoint: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """`pack` into `folder`, where a tmpfs with these options is mounted for this one process."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small disk needs root and unshare")
    shell = ["unshare", "--mount", "/bin/sh", "-c", MOUNTED, options, str(folder)]
    done = subprocess.run(
        [*shell, *command("pack", checkpoint, folder / "store")],
        capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted: {done.stderr}")
    return done


def test_the_target_exists(checkpoint: Path, folder: Path) -> None:
    store = folder / "store"
    assert flashinfer_with("pack", checkpoint, store).returncode == 0
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert_failed(flashinfer_with("pack", checkpoint, store), f"{store} already exists", "--force")
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert flashinfer_with("pack", checkpoint, store, "--force").returncode == 0
    assert names_in(folder) == ["store"]


def test_what_is_not_a_store_is_never_replaced(checkpoint: Path, folder: Path) -> None:
    (folder / "thesis.txt").write_text("years of work")
    assert_failed(flashinfer_with("pack", checkpoint, folder, "--force"), "is not a weight store", "another name")
    assert names_in(folder) == ["thesis.txt"]


def test_no_such_parent(checkpoint: Path, folder: Path) -> None:
    done = flashinfer_with("pack", checkpoint, folder / "deep" / "store")
    assert_failed(done, f"{folder / 'deep'} is not a directory", "make it first")
    assert names_in(folder) == []


def test_too_little_room_is_noticed_before_anything_is_written(checkpoint: Path, folder: Path) -> None:
    done = pack_on_a_disk("size=16k", checkpoint, folder)
    assert_failed(done, f"{folder} has 16.0 KiB free", "the store needs", "free some space or choose another disk")


def test_a_disk_that_fills_up_on_the_way(checkpoint: Path, folder: Path) -> None:
    """No inode is left for the second file, which no count of free bytes foretells."""
    done = pack_on_a_disk("size=1m,nr_inodes=4", checkpoint, folder)
    assert_failed(done, "the disk filled up while writing", "neurons", "free some space, then run again")


def test_a_limit_on_the_size_of_files(checkpoint: Path, folder: Path) -> None:
    done = flashinfer_with(
        "pack", checkpoint, folder / "store",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )  # fmt: skip
    assert_failed(done, "the disk filled up while writing", "dense", "nothing was kept")
    assert names_in(folder) == []
    assert flashinfer_with("pack", checkpoint, folder / "store").returncode == 0


def test_no_permission(checkpoint: Path, folder: Path) -> None:
    folder.chmod(0o555)
    try:
        if os.geteuid() != 0:
            done = flashinfer_with("pack", checkpoint, folder / "store")
        elif (setpriv := shutil.which("setpriv")) is not None:
            without = [setpriv, "--bounding-set=-dac_override,-dac_read_search"]
            pack = [*without, *command("pack", checkpoint, folder / "store")]
            done = subprocess.run(pack, capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=60)
            if "setpriv" in done.stderr:
                pytest.skip(f"root's rights cannot be given up: {done.stderr}")
        else:
            pytest.skip("root may write anywhere, and there is no setpriv to give that up")
    finally:
        folder.chmod(0o755)
    assert_failed(done, str(folder), "Permission denied", "choose")
    assert names_in(folder) == []
    assert flashinfer_with("pack", checkpoint, folder / "store").returncode == 0
