"""The commit protocol: at every moment the store is whole or does not exist, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashinfer.errors import DiskFullError, StoreBusyError, StoreError
from flashinfer.pack import compile, pack
from flashinfer.store import StoreWriter, open_store, verify

DEAD_PID = 2**22 + 1


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to write stores into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def is_whole(store: Path) -> bool:
    return verify(open_store(store)) == []


def stale(place: Path, kind: str = "tmp", pid: int = DEAD_PID) -> Path:
    left = place / f".model.flash.{kind}-{pid}"
    left.mkdir()
    (left / "lock").touch()
    (left / "dense.safetensors.tmp").write_bytes(b"half")
    return left


class Stopped(BaseException):
    """Stands for Ctrl-C: not an Exception."""


STEPS = [("write", os, "write"), ("fsync", os, "fsync"), ("rename", Path, "rename")]


@pytest.mark.parametrize(
    "error", [Stopped(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")]
)
@pytest.mark.parametrize(("step", "owner", "name"), STEPS)
def test_stopped_at_every_step(place, checkpoint, fake_call, monkeypatch, step, owner, name, error):
    target = place / "model.flash"
    for after in range(10_000):
        fake_call(owner, name, error, after)
        try:
            pack(checkpoint, target)
        except (Stopped, DiskFullError, StoreError) as e:
            caught: BaseException = e
        monkeypatch.undo()
        if target.exists():
            break
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        assert isinstance(caught, DiskFullError) == full
        assert isinstance(caught, Stopped) or str(place) in str(caught)
        assert list(place.iterdir()) == [], f"{step} {after}"
    assert after >= 3
    assert is_whole(target)
    assert [p.name for p in place.iterdir()] == ["model.flash"]


@pytest.mark.parametrize(("step", "owner", "name"), STEPS)
def test_replacing_stopped_at_every_step(place, checkpoint, fake_call, monkeypatch, step, owner, name):
    target = place / "model.flash"
    pack(checkpoint, target)
    before = target.stat().st_ino
    for after in range(10_000):
        fake_call(owner, name, Stopped(), after)
        try:
            pack(checkpoint, target, force=True)
            finished = True
        except Stopped:
            finished = False
        monkeypatch.undo()
        assert is_whole(target), f"{step} {after}"
        if target.stat().st_ino != before:
            break
        assert [p.name for p in place.iterdir()] == ["model.flash"]
        assert not finished
    assert after >= 3


def test_an_existing_store_needs_force(place, checkpoint):
    pack(checkpoint, place / "model.flash")
    with pytest.raises(StoreError, match=r"already exists.*--force"):
        pack(checkpoint, place / "model.flash")
    pack(checkpoint, place / "model.flash", force=True, alignment=4096)
    assert open_store(place / "model.flash").manifest.alignment == 4096
    assert [p.name for p in place.iterdir()] == ["model.flash"]


def test_force_never_replaces_what_is_no_store(place, checkpoint):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years")
    (place / "file").write_text("text")
    for name in ("mine", "file"):
        with pytest.raises(StoreError, match="not a weight store"):
            pack(checkpoint, place / name, force=True)
    assert (place / "mine" / "thesis.txt").read_text() == "years"
    assert (place / "file").read_text() == "text"


def test_an_empty_directory_is_as_good_as_none(place, checkpoint):
    (place / "model.flash").mkdir()
    pack(checkpoint, place / "model.flash")
    assert is_whole(place / "model.flash")


def test_no_parent(place, checkpoint):
    with pytest.raises(StoreError, match="nowhere is not a directory; make it first"):
        pack(checkpoint, place / "nowhere" / "model.flash")


def test_what_dead_writers_left_is_removed(place, checkpoint):
    left = [stale(place), stale(place, pid=DEAD_PID + 1), stale(place, "old")]
    other = place / ".other.flash.tmp-1"
    other.mkdir()
    (place / "model.flash").mkdir()
    pack(checkpoint, place / "model.flash")
    assert not any(p.exists() for p in left)
    assert sorted(p.name for p in place.iterdir()) == [other.name, "model.flash"]


def test_a_living_writer_is_left_alone(place, checkpoint):
    left = stale(place)
    with (left / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pack(checkpoint, place / "model.flash")
        assert (left / "dense.safetensors.tmp").exists()


def test_a_writer_that_has_not_locked_yet_is_left_alone(place, checkpoint):
    left = place / f".model.flash.tmp-{os.getppid()}"
    left.mkdir()
    pack(checkpoint, place / "model.flash")
    assert left.exists()


def test_a_store_that_lost_its_successor_is_put_back(place, checkpoint):
    pack(checkpoint, place / "model.flash")
    (place / "model.flash").rename(place / f".model.flash.old-{DEAD_PID}")
    with pytest.raises(StoreError, match="already exists"):
        pack(checkpoint, place / "model.flash")
    assert is_whole(place / "model.flash")
    assert [p.name for p in place.iterdir()] == ["model.flash"]


def test_replacing_a_store_somebody_writes(place, checkpoint):
    pack(checkpoint, place / "model.flash")
    with (place / "model.flash" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreBusyError, match=r"model\.flash is being written"):
            pack(checkpoint, place / "model.flash", force=True)
    assert [p.name for p in place.iterdir()] == ["model.flash"]


def test_two_writers_in_one_process(place):
    with StoreWriter(place / "model.flash", need=0):
        with pytest.raises(StoreBusyError):
            StoreWriter(place / "model.flash", need=0).__enter__()
    assert list(place.iterdir()) == []


def test_free_space_is_checked_first(place, checkpoint, monkeypatch):
    def full(path: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 10**6, 5, 5, 10**6, 10**6, 10**6, 0, 255))

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(DiskFullError, match=r"20\.0 KiB free, the store needs"):
        pack(checkpoint, place / "model.flash")
    assert list(place.iterdir()) == []


def test_the_need_is_exact(place, checkpoint):
    """Enough room for the need is enough: the files take at most that."""
    asked: list[int] = []

    class Spy(StoreWriter):
        def __init__(self, target: Path, *, need: int, force: bool = False) -> None:
            asked.append(need)
            super().__init__(target, need=need, force=force)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "StoreWriter", Spy)
        pack(checkpoint, place / "model.flash")
    sizes = [p.stat().st_size for p in (place / "model.flash").iterdir()]
    assert sum(-(-s // 4096) * 4096 for s in sizes) == asked[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(place, checkpoint, monkeypatch):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(DiskFullError, match="free, the store needs"):
            pack(checkpoint, place / "model.flash")
        monkeypatch.setattr("flashinfer.store.writer.check_room", lambda directory, need: None)
        with pytest.raises(DiskFullError, match="the disk filled up while writing"):
            pack(checkpoint, place / "model.flash")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


CHILD = """
import signal, sys, time
import flashinfer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits one that is ignored

def stop(done, total):
    print("writing", flush=True)
    time.sleep(60)

flashinfer.pack(sys.argv[1], sys.argv[2], progress=stop)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_process(place, checkpoint, sent):
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(place / "model.flash")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "writing\n"
        assert not (place / "model.flash").exists()
        child.send_signal(sent)
        assert child.wait(20) != 0
    assert len(list(place.iterdir())) == (0 if sent == signal.SIGINT else 1)
    pack(checkpoint, place / "model.flash")
    assert is_whole(place / "model.flash")
    assert [p.name for p in place.iterdir()] == ["model.flash"]


def test_stopped_while_the_old_store_is_removed(place, checkpoint, monkeypatch):
    target, remove = place / "model.flash", shutil.rmtree
    pack(checkpoint, target)
    stops = iter([Stopped()])

    def stopped_once(path: Path, **options: bool) -> None:
        if (stop := next(stops, None)) is not None:
            raise stop
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stopped_once)
    with pytest.raises(Stopped):
        pack(checkpoint, target, quant="f16", force=True)
    assert [path.name for path in place.iterdir()] == ["model.flash"]
    assert is_whole(target)
    assert open_store(target).manifest.tensors["embed.weight"].codec == "f16"
