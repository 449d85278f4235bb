"""Changing a store: whatever goes wrong, it opens and verifies as it was or as it became."""

from __future__ import annotations

import fcntl
import os
import shutil

import msgspec
import pytest

from flashinfer.errors import DiskFullError, StoreBusyError, StoreError
from flashinfer.pack import pack
from flashinfer.store import StoreUpdate, StoreWriter, open_store
from tests.store.changing import TEXT, change, expected_names, is_sound, names
from tests.store.forging import flip
from tests.store.predicted import add_predictors, calibration_for


def test_a_change(store):
    opened = open_store(store)
    before, manifest = names(store), change(opened)
    after = open_store(store)
    assert after.manifest == msgspec.structs.replace(manifest, version=3)
    assert (names(store), is_sound(store)) == (expected_names(manifest), True)
    assert before - names(store) == {opened.manifest.text[TEXT].name}
    assert after.read_range(after.manifest.text[TEXT], 0, 2) == b"{}"
    found = after.calibration()
    assert found is not None
    assert msgspec.structs.replace(found, weights="") == calibration_for()


def test_leaving_without_commit(store):
    opened, before = open_store(store), names(store)
    with StoreUpdate(opened) as update:
        with update.create("predictors", ".safetensors") as file:
            file.write(b"1234")
        assert names(store) > before
    assert names(store) == before
    assert open_store(store) == opened


def test_a_file_that_is_already_there_is_kept(store):
    opened = open_store(store)
    old = opened.path_of(opened.manifest.dense)
    inode = old.stat().st_ino
    with StoreUpdate(opened) as update:
        with update.create("dense", ".safetensors") as file:
            file.write(old.read_bytes())
        assert update.entries == [opened.manifest.dense]
        assert old.stat().st_ino == inode
        update.commit(opened.manifest)
    assert is_sound(store)
    assert names(store) == expected_names(opened.manifest)


def test_a_cut_file_of_that_name_is_replaced(store):
    opened = open_store(store)
    old = opened.path_of(opened.manifest.dense)
    data = old.read_bytes()
    old.write_bytes(data[:100])
    with StoreUpdate(opened) as update:
        with update.create("dense", ".safetensors") as file:
            file.write(data)
        update.commit(opened.manifest)
    assert is_sound(store)


def test_nothing_else_is_ever_removed(store):
    others = [
        "notes.txt", "dense.safetensors", "dense-0123.safetensors", "dense-0123456789abcdef.bin", "mine.tmp",
        "text-0123456789abcdeg-x", "0123456789abcdef.json", "predictors-0123456789abcdef.safetensors.old", ".tmp",
    ]  # fmt: skip
    ours = [
        "dense-0123456789abcdef.safetensors", "neurons-0123456789abcdef.bin", "calibration-0123456789abcdef.json",
        "predictors-0123456789abcdef.safetensors", "text-0123456789abcdef-config.json", "predictors.safetensors.tmp",
        "text-config.json.tmp", "manifest.json.tmp",
    ]  # fmt: skip
    for name in others + ours:
        (store / name).write_text("x")
    (store / "neurons-fedcba9876543210.bin").mkdir()
    (store / ".calibrate").mkdir()
    opened = open_store(store)
    kept = {*others, "neurons-fedcba9876543210.bin", ".calibrate"}
    with StoreUpdate(opened):
        assert names(store) == expected_names(opened.manifest) | kept
    manifest = change(opened)
    assert names(store) == expected_names(manifest) | kept


def test_a_link_in_place_of_a_leftover_is_not_followed(store, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    (store / "dense-0123456789abcdef.safetensors").symlink_to(tmp_path / "thesis.txt")
    change(open_store(store))
    assert (tmp_path / "thesis.txt").read_text() == "years"
    assert is_sound(store)


def test_a_reader_keeps_what_it_opened(store):
    opened = open_store(store)
    path = opened.path_of(opened.manifest.text[TEXT])
    expected = path.read_bytes()
    with path.open("rb", buffering=0) as reader:
        change(opened)
        assert not path.exists()
        assert reader.read() == expected


def test_two_updates_at_once(store):
    opened = open_store(store)
    with StoreUpdate(opened):
        with pytest.raises(StoreBusyError, match="is being written by another process"):
            StoreUpdate(opened).__enter__()
    change(opened)


def test_one_that_was_changed_meanwhile(store):
    opened = open_store(store)
    change(opened)
    before = names(store)
    with pytest.raises(StoreError, match="was changed by another process; open it again"):
        StoreUpdate(opened).__enter__()
    assert names(store) == before
    change(open_store(store), b"{ }")


def test_one_that_was_replaced_meanwhile(store, checkpoint):
    opened = open_store(store)
    pack(checkpoint, store, quant="f16", force=True)
    with pytest.raises(StoreError, match="was changed by another process"):
        StoreUpdate(opened).__enter__()
    assert open_store(store).manifest.tensors["embed.weight"].codec == "f16"


def test_a_directory_that_is_swapped_while_its_lock_is_taken(store, tmp_path, monkeypatch):
    """The lock was that of the old directory, which somebody moved away just then: it does not count."""
    opened, flock = open_store(store), fcntl.flock
    shutil.copytree(store, tmp_path / "new")

    def swapped(fd: int, operation: int) -> None:
        monkeypatch.undo()
        store.rename(tmp_path / "old")
        (tmp_path / "new").rename(store)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", swapped)
    with pytest.raises(StoreBusyError):
        StoreUpdate(opened).__enter__()
    change(opened)


def test_nobody_replaces_a_store_that_is_being_changed(store, checkpoint):
    opened = open_store(store)
    with StoreUpdate(opened) as update:
        with pytest.raises(StoreBusyError):
            pack(checkpoint, store, force=True)
        update.commit(opened.manifest)
    assert is_sound(store)


@pytest.mark.parametrize("forge", ["missing", "size", "format"])
def test_a_manifest_that_would_break_the_store_is_not_committed(store, forge):
    opened = open_store(store)
    m = opened.manifest
    broken = {
        "missing": msgspec.structs.replace(m, text={"a": msgspec.structs.replace(m.text[TEXT], name="text-a")}),
        "size": msgspec.structs.replace(m, dense=msgspec.structs.replace(m.dense, bytes=m.dense.bytes + 4096)),
        "format": msgspec.structs.replace(m, layers=m.layers[:1]),
    }[forge]
    with StoreUpdate(opened) as update, pytest.raises(StoreError):
        update.commit(broken)
    assert open_store(store) == opened
    assert names(store) == expected_names(m)


def test_room_is_checked_first(store, monkeypatch):
    def nearly_full(path: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 10**6, 5, 5, 10**6, 10**6, 10**6, 0, 255))

    opened = open_store(store)
    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(DiskFullError, match=r"20\.0 KiB free, the store needs 20\.0 KiB"):
        StoreUpdate(opened, need=5 * 4096 + 1).__enter__()
    with StoreUpdate(opened, need=5 * 4096) as update:
        with pytest.raises(DiskFullError, match=r"20\.0 KiB free"):
            update.require(5 * 4096 + 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written(store):
    store.chmod(0o555)
    (store / "lock").chmod(0o444)
    try:
        with pytest.raises(StoreError, match="choose a directory that can be written to"):
            StoreUpdate(open_store(store)).__enter__()
    finally:
        store.chmod(0o755)


def test_a_store_may_change_again_and_again(calibrated):
    for text in (b"1", b"22", b"333"):
        manifest = change(open_store(calibrated), text)
        assert names(calibrated) == expected_names(manifest)
    assert is_sound(calibrated)
    add_predictors(open_store(calibrated), codec="f32")
    assert is_sound(calibrated)
    assert open_store(calibrated).manifest.tensors["layers.0.ffn.lowrank.a.weight"].codec == "f32"


def test_writer_and_update_make_files_the_same_way():
    assert StoreWriter.create is StoreUpdate.create


def test_a_damaged_manifest_removes_nothing(store):
    """Who cannot say what belongs to the store removes none of it."""
    opened, before = open_store(store), names(store)
    data = (store / "manifest.json").read_bytes()
    with StoreUpdate(opened) as update:
        with update.create("predictors", ".safetensors") as file:
            file.write(b"1234")
        flip(store / "manifest.json", 0)
    assert names(store) > before
    (store / "manifest.json").write_bytes(data)
    with StoreUpdate(opened):
        assert names(store) == before
