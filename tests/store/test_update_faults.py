"""What goes wrong while a store is changed: it opens and verifies as it was or as it became."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from flashinfer.errors import DiskFullError, StoreBusyError, StoreError
from flashinfer.store import StoreUpdate, open_store
from tests.store.changing import change, expected_names, is_sound, names
from tests.store.predicted import calibration_for


class Stopped(BaseException):
    """Stands for Ctrl-C: not an Exception."""


ERRORS = [Stopped(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")]
STEPS = [("write", os, "write"), ("fsync", os, "fsync"), ("rename", Path, "rename"), ("unlink", Path, "unlink")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("step", "owner", "name"), STEPS)
def test_stopped_at_every_step(store, fake_call, monkeypatch, step, owner, name, error):
    """Until the manifest is renamed the store is the old one; from then on it is the new one. No file is too many."""
    opened = open_store(store)
    for after in range(10_000):
        fake_call(owner, name, error, after)
        try:
            change(opened)
        except (Stopped, DiskFullError, StoreError) as e:
            caught: BaseException | None = e
        else:
            caught = None
        monkeypatch.undo()
        now = open_store(store)
        assert is_sound(store), f"{step} {after}"
        if now.manifest != opened.manifest:
            break
        assert caught is not None
        assert isinstance(caught, DiskFullError) == (getattr(error, "errno", 0) == errno.ENOSPC)
        assert isinstance(caught, Stopped) or str(store) in str(caught)
        assert names(store) == expected_names(opened.manifest), f"{step} {after}"
    assert after >= {"write": 3, "fsync": 4, "rename": 3, "unlink": 0}[step]
    found = now.calibration()
    assert found is not None
    assert msgspec.structs.replace(found, weights="") == calibration_for()
    # what is in nobody's manifest is gone, now or when the next one comes
    with StoreUpdate(now):
        assert names(store) == expected_names(now.manifest)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_at_the_rename_itself(store, monkeypatch, moment):
    """An interruption may come when the new manifest is in place and the process does not know it yet."""
    opened, rename = open_store(store), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name != "manifest.json.tmp":
            return rename(path, target)
        if moment == "after":
            rename(path, target)
        raise Stopped

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(Stopped):
        change(opened)
    monkeypatch.undo()
    assert (open_store(store).manifest == opened.manifest) == (moment == "before")
    assert is_sound(store)
    assert names(store) == expected_names(open_store(store).manifest)


def test_what_cannot_be_removed_is_left_to_the_next(store, fake_call, monkeypatch):
    opened = open_store(store)
    fake_call(Path, "unlink", OSError(errno.EPERM, "Operation not permitted"))
    manifest = change(opened)
    monkeypatch.undo()
    assert is_sound(store)
    with StoreUpdate(open_store(store)):
        assert names(store) == expected_names(manifest)


CHILD = """
import os, sys, time
from pathlib import Path
from flashinfer.store import open_store
from tests.store.changing import change

kind, after = sys.argv[2], int(sys.argv[3])
owner, name = {"write": (os, "write"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[kind]
real, calls = getattr(owner, name), [0]

def waiting(*args):
    calls[0] += 1
    if calls[0] == after + 1:
        os.set_blocking(1, True)
        sys.stdout.write("here\\n")
        sys.stdout.flush()
        time.sleep(60)
    return real(*args)

opened = open_store(sys.argv[1])
setattr(owner, name, waiting)
change(opened)
"""


@pytest.mark.parametrize(("kind", "after"), [("write", 0), ("fsync", 2), ("rename", 2), ("fsync", 4)])
def test_a_killed_process(store, kind, after):
    """SIGKILL in the middle: of the first file, before and at the rename of the manifest, and right after it."""
    opened = open_store(store)
    command = [sys.executable, "-c", CHILD, str(store), kind, str(after)]
    root = Path(__file__).parents[2]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "here\n"
        with pytest.raises(StoreBusyError):
            StoreUpdate(opened).__enter__()
        child.send_signal(signal.SIGKILL)
        assert child.wait(20) == -signal.SIGKILL
    now = open_store(store)
    assert (now.manifest == opened.manifest) == ((kind, after) != ("fsync", 4))
    assert is_sound(store)
    assert names(store) > expected_names(now.manifest)
    with StoreUpdate(now):
        assert names(store) == expected_names(now.manifest)
