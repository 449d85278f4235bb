"""The disk benchmark: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from flashinfer.bench import io, place
from flashinfer.bench.io import all_combinations, measure
from flashinfer.bench.io_figures import Combination, Result, Slice, fit_curve, summary
from flashinfer.bench.io_file import file_to_read
from flashinfer.bench.place import place_of
from flashinfer.cli import main
from flashinfer.errors import DiskFullError, PlatformError, StoreError
from flashinfer.units import KIB, MIB


def test_every_combination_is_measured_in_every_round(tmp_path: Path) -> None:
    combinations = all_combinations([4 * KIB, 64 * KIB], [1, 3])
    said: list[str] = []
    with file_to_read(tmp_path, MIB, said.append) as file:
        assert file.stat().st_size == MIB
        assert file.read_bytes().count(0) < MIB // 100
        measured = measure(file, combinations, seconds=0.002, rounds=2, progress=said.append)
    assert [r.combination for r in measured.results] == combinations
    assert all(r.rounds == 2 and 0 < r.low <= r.mb_per_s <= r.high for r in measured.results)
    assert all(0 < r.p50_s <= r.p99_s and r.fio is None for r in measured.results)
    assert len(said) == 1 + 2 * len(combinations)
    assert measured.note


def test_the_test_file_goes_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with file_to_read(tmp_path, 4096):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_users_is_read_and_kept(tmp_path: Path) -> None:
    mine = tmp_path / "mine.bin"
    mine.write_bytes(os.urandom(MIB))
    link = tmp_path / "link"
    link.symlink_to(mine)
    with file_to_read(link, 4096) as file:
        measured = measure(file, [Combination("sequential", MIB, 2)], seconds=0.001, rounds=1, direct=False)
    assert not measured.direct
    assert mine.exists()


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="--file-size"):
        with file_to_read(tmp_path, 1 << 60):
            raise AssertionError("must not get here")
    assert not list(tmp_path.iterdir())


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        with file_to_read(tmp_path / "absent", 4096):
            raise AssertionError("must not get here")


@pytest.mark.parametrize("chunk", [0, 2 * MIB, 100])
def test_a_chunk_that_cannot_be_read_is_refused(tmp_path: Path, chunk: int) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(MIB))
    with pytest.raises(ValueError):
        measure(file, [Combination("random", chunk, 1)], seconds=0.001)


def test_the_fit_finds_the_curve_it_was_made_from() -> None:
    def result(chunk: int, threads: int) -> Result:
        seconds = 10e-6 + chunk / 2e9
        return summary(Combination("random", chunk, threads), [Slice(chunk, 1, seconds, 0, seconds, seconds)])

    curve = fit_curve([result(chunk, 16) for chunk in io.CHUNKS] + [result(4096, 1)], 16)
    assert curve is not None
    assert curve.per_read_s == pytest.approx(10e-6)
    assert curve.bytes_per_s == pytest.approx(2e9)
    assert curve.break_even_gap == pytest.approx(20_000, abs=1)
    assert fit_curve([result(4096, 1)], 1) is None


def test_place_names_something(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    assert place.filesystem
    assert place.device


ALONE = ["--file-size", "1MiB", "--seconds", "0.01", "--rounds", "1", "--no-fio"]
QUICK = [*ALONE, "--chunk", "4KiB", "--chunk", "64KiB"]


def test_how_far_the_kernel_reads_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, number = tmp_path / "disk", tmp_path.stat().st_dev
    (disk / "queue").mkdir(parents=True)
    monkeypatch.setattr(place, "_SYS", tmp_path)
    monkeypatch.setattr(place, "_CLASS", tmp_path / "nothing")
    assert place.read_ahead_of(tmp_path) is None
    (tmp_path / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk)
    assert place.read_ahead_of(tmp_path) is None
    (disk / "queue" / "read_ahead_kb").write_text("128\n")
    assert place.read_ahead_of(tmp_path) == 128 * 1024


def test_the_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(tmp_path), *QUICK, "--threads", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema_version"] == 1
    assert len(said["results"]) == 4
    assert said["results"][0].keys() >= {
        "pattern",
        "chunk",
        "threads",
        "reader",
        "mb_per_s",
        "low",
        "high",
        "p50_s",
        "p99_s",
        "cpu_s_per_gb",
    }
    assert said["fio"] is said["results"][0]["fio"] is None


@pytest.mark.parametrize("pattern", ["random", "sequential"])
def test_one_pattern_alone(tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(tmp_path), *QUICK, "--threads", "2", "--pattern", pattern, "--json"]) == 0
    assert [row["pattern"] for row in json.loads(capsys.readouterr().out)["results"]] == [pattern] * 2


def test_the_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "speed.png"
    assert main(["bench", "io", str(tmp_path), *QUICK, "--threads", "2", "--plot", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(io, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "io", str(tmp_path), *QUICK, "--plot", str(tmp_path / "speed.png")]) == 1
    assert "needs matplotlib" in capsys.readouterr().err


def test_readers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--reader", "auto", "--reader", "threads", "--threads", "2", "--threads", "3"]
    assert main(["bench", "io", str(tmp_path), *QUICK, *both, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["results"]) == 16
    assert {(row["reader"], row["threads"]) for row in said["results"]} == {
        (name, n) for name in ("auto", "threads") for n in (2, 3)
    }


def test_an_io_uring_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PlatformError("the kernel refused it: Operation not permitted")

    monkeypatch.setattr("flashinfer.io.UringReader", refused)
    assert main(["bench", "io", str(tmp_path), *QUICK, "--reader", "io_uring"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "no io_uring here: the kernel refused it: Operation not permitted" in said[0]


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(tmp_path), *QUICK, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "sequential" in out
    assert "device:" in out


@pytest.mark.parametrize(
    "wrong",
    [["--chunk", "much"], ["--chunk", "2MiB"], ["--threads", "0"], ["--reader", "aio"], ["--pattern", "zigzag"]],
)
def test_wrong_usage(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(tmp_path), "--file-size", "1MiB", *wrong]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
