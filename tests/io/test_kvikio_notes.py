"""How kvikio reads here: what the reader says of it, and what it refuses, each in one line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from flashinfer.config import BOUNCE_BUFFER, FILE_ALIGNMENT, IoConfig
from flashinfer.errors import PlatformError, StoreError
from flashinfer.io import DeviceReader, KvikioReader, ThreadReader, kvikio, open_reader
from tests.io.kvikio_stand_in import CompatMode, StandIn, install, opened
from tests.io.reader_conformance import assert_reads, contents, extents
from tests.io.test_thread_reader import write


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"gds": True}, "GPUDirect Storage"),
        ({"gds": True, "setting": CompatMode.OFF}, "GPUDirect Storage"),
        ({}, "because the kernel module nvidia-fs is not loaded"),
        ({"cufile": (0, 0)}, "because libcufile cannot be loaded"),
        ({"gds": True, "udev": False}, "because /run/udev cannot be read, or this is WSL"),
        ({"gds": True, "setting": CompatMode.ON}, "because KVIKIO_COMPAT_MODE asks for it"),
    ],
)
def test_the_note_says_how_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], how: str
) -> None:
    stand_in = install(monkeypatch, StandIn(**options))
    reader = opened(write(tmp_path, (contents(1),)))
    assert reader.note.endswith(how)
    assert f"4 threads of kvikio {stand_in.__version__}, " in reader.note
    assert ("compatibility mode" in reader.note) == (how != "GPUDirect Storage")
    # without GPUDirect Storage cuFile, which would find a way of its own, is not even asked
    asked = options.get("setting", CompatMode.AUTO) if how == "GPUDirect Storage" else CompatMode.ON
    assert stand_in.opened == [CompatMode.ON, asked]
    assert stand_in.settings["compat_mode"] is options.get("setting", CompatMode.AUTO)
    reader.close()


def test_what_it_sets_and_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = install(monkeypatch, StandIn())
    reader = opened(write(tmp_path, (contents(1), contents(2))), threads=3)
    assert stand_in.settings["num_threads"] == 3
    assert stand_in.settings["bounce_buffer_size"] == BOUNCE_BUFFER
    assert reader.direct
    assert isinstance(reader, DeviceReader)
    reader.close()
    reader.close()
    assert stand_in.freed == 1


def test_memory_for_its_buffers_is_planned() -> None:
    """One for each of its threads, and one for the caller, who makes the short reads."""
    assert IoConfig(reader="kvikio", threads=7).bounce == 8 * BOUNCE_BUFFER
    assert IoConfig(reader="threads").bounce == IoConfig().bounce == 0


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def refusal(path: Path) -> str:
    before = open_files()
    with pytest.raises(PlatformError) as caught:
        open_reader([path], IoConfig(reader="kvikio"))
    assert open_files() == before
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith("; or read without --reader kvikio")
    return said


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal(write(tmp_path, (contents(1),))[0])
    assert said.startswith("no kvikio here: it is not installed; pip install 'flashinfer-offload[gds]'; ")


def test_installed_without_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "kvikio"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcufile.so.0:\\n no such file')")
    monkeypatch.delitem(sys.modules, "kvikio", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    said = refusal(write(tmp_path, (contents(1),))[0])
    assert said.startswith("no kvikio here: it does not load: libcufile.so.0: no such file; pip install ")


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn(driver_error="KvikIO failure at: /a.cpp:21: libcuda.so.1: cannot open"))
    monkeypatch.setattr(kvikio, "_driver", lambda: None)
    said = refusal(write(tmp_path, (contents(1),))[0])
    assert said.startswith("no kvikio here: there is no NVIDIA driver (libcuda.so.1: cannot open); ")


def test_a_driver_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn(driver_error="KvikIO failure at: /a.cpp:39: undefined symbol: cuMemcpyBatchAsync"))
    monkeypatch.setattr(kvikio, "_driver", lambda: "11.4")
    said = refusal(write(tmp_path, (contents(1),))[0])
    assert "does not run with this driver, which knows CUDA 11.4: undefined symbol: cuMemcpyBatchAsync; update" in said


def test_no_gds_where_only_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn(setting=CompatMode.OFF))
    said = refusal(write(tmp_path, (contents(1),))[0])
    assert said.startswith(
        "KVIKIO_COMPAT_MODE forbids the compatibility mode, and there is no GPUDirect Storage here: "
    )
    assert "nvidia-fs" in said


def test_the_reader_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn())
    paths = write(tmp_path, (contents(1), contents(2)))
    reader = open_reader(paths, IoConfig(reader="kvikio", threads=5))
    assert isinstance(reader, KvikioReader)
    assert "to the device 5 threads of kvikio" in reader.note
    assert_reads(reader, contents(1), extents((4096, 4096, 0)))
    reader.close()
    with contextlib.closing(open_reader(paths, IoConfig())) as other:
        assert not isinstance(other, DeviceReader)


def broken(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("blob", [b"short", contents(1)])
def test_the_trial_is_of_the_driver_not_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blob: bytes
) -> None:
    """One that is shorter than a page, or on a bad sector, shows as well that kvikio runs."""
    install(monkeypatch, StandIn())
    path = write(tmp_path, (blob,))[0]
    if len(blob) > FILE_ALIGNMENT:
        monkeypatch.setattr(os, "preadv", broken)
    assert "compatibility mode" in kvikio.load_kvikio(path).how


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn())
    paths = write(tmp_path, (contents(1), contents(2)))
    with contextlib.closing(ThreadReader(paths, threads=1)) as host:
        paths[1].unlink()
        with pytest.raises(StoreError, match=r"cannot open .*1\.bin: No such file or directory; check"):
            KvikioReader(paths, host, threads=1)
