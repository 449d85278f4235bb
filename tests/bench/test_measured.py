"""What is remembered of a machine, how it is measured, and what `doctor` sees: never how fast anything is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flashinfer import machine
from flashinfer.backend import open_backend
from flashinfer.bench import checkup, place
from flashinfer.bench.curve import curve_of, measure_curve
from flashinfer.bench.io_figures import Combination, Result, Slice, summary
from flashinfer.bench.known import ENOUGH, Known, KnownDisk, cache_file, load_known, remember
from flashinfer.bench.place import Place, place_of
from flashinfer.bench.rates import measure_rates
from flashinfer.config import DiskCurve, Rates
from flashinfer.io import kvikio
from flashinfer.units import KIB, MIB
from tests.io.kvikio_stand_in import StandIn, install

PLACE = Place("ext4", "nvme0n1", "ssd")
DISK = KnownDisk(DiskCurve(1e-6, 5e9, 70e-6), ENOUGH, "2026-01-01T00:00:00+00:00", "direct")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file()


def test_what_is_remembered_comes_back(cache: Path) -> None:
    assert load_known() == Known()
    assert remember(disk=(PLACE, DISK))
    assert remember(rates=("cpu", Rates(dram=1.0)))
    known = load_known()
    assert known.disk(PLACE, 10 * ENOUGH) == DISK
    assert known.disk(Place("xfs", "nvme0n1"), 1) is None
    assert known.rates == {"cpu": Rates(dram=1.0)}
    assert [f.name for f in cache.parent.iterdir()] == [cache.name]


def test_a_curve_of_a_small_file_does_not_hold_for_a_large_one() -> None:
    small = KnownDisk(DISK.curve, 8 * MIB, DISK.when, DISK.note)
    remember(disk=(PLACE, small))
    assert load_known().disk(PLACE, 8 * MIB) == small
    assert load_known().disk(PLACE, 9 * MIB) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"schema_version": 2}', b'{"disks": 1}', b"\xff"])
def test_a_file_that_cannot_be_used_is_no_knowledge(cache: Path, data: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(data)
    assert load_known() == Known()
    assert remember(disk=(PLACE, DISK))
    assert load_known().disk(PLACE, 1) == DISK


def test_no_cache_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not remember(disk=(PLACE, DISK))
    assert load_known() == Known()


def test_a_curve_is_measured_on_a_file(tmp_path: Path) -> None:
    file = tmp_path / "neurons"
    file.write_bytes(b"x" * 200 * KIB)
    found = measure_curve(file, seconds=0.002)
    assert found is None or (found.curve.latency_s >= found.curve.per_read_s >= 0 and found.file_bytes == 200 * KIB)
    file.write_bytes(b"x" * 4 * KIB)
    assert measure_curve(file, seconds=0.002) is None


def test_the_curve_is_the_one_the_figures_were_made_from() -> None:
    def result(chunk: int, threads: int, seconds: float) -> Result:
        return summary(Combination("random", chunk, threads), [Slice(chunk, 1, seconds, 0, seconds, seconds)])

    chunks = (4 * KIB, 64 * KIB, MIB)
    many = [result(c, 16, 10e-6 + c / 2e9) for c in chunks]
    curve = curve_of([*many, *(result(c, 1, 80e-6 + c / 2e9) for c in chunks)], 16)
    assert curve is not None
    assert (curve.per_read_s, curve.bytes_per_s) == (pytest.approx(10e-6), pytest.approx(2e9))
    assert curve.latency_s == pytest.approx(80e-6)


@pytest.mark.parametrize(("codec", "gated"), [("f16", True), ("f32", False)])
def test_rates_are_measured(codec: str, gated: bool) -> None:
    backend = open_backend("cpu", 2)
    try:
        rates = measure_rates(backend, codec, hidden=64, gated=gated, buffer=MIB)
    finally:
        backend.close()
    assert all(rate > 0 for rate in vars(rates).values())


# -- where things lie

MOUNTS = """\
21 1 254:1 / / rw - ext4 /dev/none1 rw
22 21 0:40 / /net rw shared:1 - nfs4 server:/export rw
23 21 0:41 / /ram rw - tmpfs tmpfs rw
24 21 0:42 / /boxed\\040disk rw - btrfs /dev/none2 rw
"""


@pytest.mark.parametrize(
    ("path", "filesystem", "kind"),
    [("/net/a/store", "nfs4", "network"), ("/ram/store", "tmpfs", "memory"), ("/boxed disk/x", "btrfs", "unknown")],
)
def test_the_kind_of_a_place(tmp_path, monkeypatch, path: str, filesystem: str, kind: str) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(place, "_MOUNTS", tmp_path / "mounts")
    found, source = place._mount_of(Path(path))
    assert (found, place._kind(found, None)) == (filesystem, kind)
    assert source


def test_a_place_where_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOUNTS", "_SYS", "_CLASS"):
        monkeypatch.setattr(place, name, tmp_path / "absent")
    assert place_of(tmp_path) == Place("unknown", "unknown", "unknown")


@pytest.mark.parametrize("turns", [True, False])
def test_a_disk_that_turns(tmp_path: Path, turns: bool) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "rotational").write_text(f"{int(turns)}\n")
    assert place._kind("ext4", tmp_path) == ("rotational" if turns else "ssd")


# -- doctor


def test_doctor_without_a_path() -> None:
    names = [c.name for c in checkup.examine(None)]
    assert names[:3] == ["system", "processor", "features"]
    assert {"threads", "memory", "swap", "versions", "GPU"} <= set(names)


@pytest.mark.parametrize("kind", ["network", "memory", "rotational"])
def test_doctor_says_what_a_place_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind) -> None:
    monkeypatch.setattr(checkup, "place_of", lambda _: Place("some", "disk", kind))
    (tmp_path / "file").write_bytes(b"x" * 8192)
    found = {c.name: c for c in checkup.examine(tmp_path)}
    assert found["device"].status == "warn"
    assert found["device"].advice
    assert found["direct reads"].text
    assert "flashinfer plan" in found["disk curve"].advice


def test_doctor_shows_the_known_curve(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8192)
    remember(disk=(place_of(tmp_path), DISK))
    curve = next(c for c in checkup.examine(tmp_path) if c.name == "disk curve")
    assert (curve.status, "5.00 GB/s" in curve.text) == ("ok", True)


def test_doctor_where_little_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_info", list)
    monkeypatch.setattr(machine, "memory_limits", list)
    monkeypatch.setattr(checkup.importlib.util, "find_spec", lambda _: None)
    found = {c.name: c for c in checkup.examine(tmp_path / "absent")}
    assert found["path"].status == "warn"
    assert "not installed" in found["GPU"].text
    assert found["cgroup"].text == "no memory limit"


@pytest.mark.parametrize(
    ("installed", "why", "text", "advice"),
    [
        (False, None, "torch's, which are slow; Triton is not installed", "pip install 'flashinfer-offload[gpu]'"),
        (True, "no gcc", "torch's, which are slow; Triton's do not run: no gcc", "install a C compiler"),
        (True, None, "Triton's, 3", ""),
    ],
)
def test_doctor_on_a_card(monkeypatch: pytest.MonkeyPatch, installed, why, text: str, advice: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(checkup, "has_triton", lambda: installed)
    if installed:
        backend = pytest.importorskip("flashinfer.backend.triton_backend", reason="Triton is not installed")
        monkeypatch.setattr(backend, "why_not", lambda _: why)
    found = {c.name: c for c in checkup.examine(None)}
    assert found["GPU"].text == "Some Card (used with --device cuda)"
    assert found["GPU kernels"].text.startswith(text)
    assert found["GPU kernels"].advice == advice
    assert found["GPU reads"].text.startswith("through the host's memory; ")


@pytest.mark.parametrize(
    ("installed", "text"),
    [
        (None, "; no kvikio here: it is not installed; pip install 'flashinfer-offload[gds]'"),
        (StandIn(gds=True), f"; with --reader kvikio: kvikio {StandIn.__version__}, GPUDirect Storage"),
        (StandIn(), "because the kernel module nvidia-fs is not loaded"),
        (
            StandIn(driver_error="libcuda.so.1: no file"),
            "there is no NVIDIA driver (libcuda.so.1: no file); install it",
        ),
    ],
)
def test_doctor_says_how_a_card_could_be_read_to(
    monkeypatch: pytest.MonkeyPatch, installed: StandIn | None, text: str
) -> None:
    if installed is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        install(monkeypatch, installed)
    monkeypatch.setattr(kvikio, "_driver", lambda: None)
    said = checkup._gpu_reads()
    assert said.status == "ok"
    assert said.text.startswith("through the host's memory; ")
    assert said.text.endswith(text)


def test_doctor_finds_a_damaged_store(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    store = next(c for c in checkup.examine(tmp_path) if c.name == "store")
    assert (store.status, store.advice) == ("warn", "pack the checkpoint again")
