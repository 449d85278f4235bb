"""What a calibration keeps for the next one: only for the same one, and only what is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.errors import DiskFullError, StoreError
from flashinfer.tune import work as module
from flashinfer.tune.work import NAME, Work, check_writable, work_bytes


def test_steps_are_remembered(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    assert not work.resumed
    assert work.done("one") is None
    result: dict[str, Any] = {"a": [1.5, 0.1], "b": None, "c": "text", "d": 3}
    work.note("one", result)
    work.note("two")
    again = Work(tmp_path, "key")
    assert again.resumed
    assert again.done("one") == result
    assert again.done("two") is True
    assert again.done("three") is None


def test_a_number_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = [*np.random.default_rng(0).standard_normal(100).tolist(), 1e-310, 1e300, 0.1 + 0.2]
    Work(tmp_path, "key").note("numbers", values)
    assert Work(tmp_path, "key").done("numbers") == values


def test_begun_is_not_resumed(tmp_path: Path) -> None:
    """Nothing was done yet that anyone could go on with."""
    Work(tmp_path, "key")
    assert not Work(tmp_path, "key").resumed


def test_another_key_begins_anew(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    work.note("one")
    (work.path / "layer-0.samples").write_bytes(b"data")
    other = Work(tmp_path, "another")
    assert not other.resumed
    assert other.done("one") is None
    assert [p.name for p in other.path.iterdir()] == ["state.json"]
    assert not Work(tmp_path, "key").resumed


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"key": "key"}', b'{"key": "key", "done": [1]}',
        b'{"key": 7, "done": {"one": true}}', b'{"done": {"one": true}}',
    ],
)  # fmt: skip
def test_a_damaged_state_begins_anew(tmp_path: Path, data: bytes) -> None:
    work = Work(tmp_path, "key")
    work.note("one")
    (work.path / "state.json").write_bytes(data)
    (work.path / "stray").write_bytes(b"data")
    again = Work(tmp_path, "key")
    assert not again.resumed
    assert again.done("one") is None
    assert not (again.path / "stray").exists()
    again.note("two")
    assert Work(tmp_path, "key").done("two") is True


def test_the_state_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, what was noted before is still there."""
    work = Work(tmp_path, "key")
    work.note("one")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            work.note("two")
    again = Work(tmp_path, "key")
    assert again.done("one") is True
    assert again.done("two") is None


def test_arrays_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (synced.append(fd), sync(fd)))
    work = Work(tmp_path, "key")
    synced.clear()
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([1 << 40], dtype=np.int64)
    work.keep("layer-0.things", a=a, b=b, c=2.5)
    assert len(synced) == 1
    found = Work(tmp_path, "key").kept("layer-0.things")
    assert [*found] == ["a", "b", "c"]
    for name, value in (("a", a), ("b", b), ("c", np.float64(2.5))):
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other"])
def test_arrays_that_are_damaged(tmp_path: Path, damage: str) -> None:
    work = Work(tmp_path, "key")
    work.keep("things", a=np.arange(1000))
    [path] = work.path.glob("*.npz")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"x" * 100}[damage])
    with pytest.raises(StoreError, match=r"things\.npz, kept for later .* cannot be read .*calibrate again"):
        work.kept("things")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path, "key")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"state\.json"):
        work.note("one")
    with pytest.raises(DiskFullError, match=r"things\.npz"):
        work.keep("things", a=np.arange(3))


def test_what_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"data")
    with pytest.raises(StoreError, match=r"\.calibrate failed"):
        Work(tmp_path, "key")


def test_removing(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    work.note("one")
    work.keep("things", a=np.arange(3))
    assert work_bytes(tmp_path) == sum(p.stat().st_size for p in work.path.iterdir()) > 0
    work.remove()
    assert not work.path.exists()
    assert work_bytes(tmp_path) == 0
    work.remove()


def test_the_state_is_json_of_plain_words(tmp_path: Path) -> None:
    work = Work(tmp_path, "key")
    work.note("one", 1)
    assert json.loads((work.path / "state.json").read_text()) == {"key": "key", "done": {"one": 1}}


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path)
    monkeypatch.setattr(module.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(StoreError, match="cannot be written to, and calibration changes the store"):
        check_writable(tmp_path)
