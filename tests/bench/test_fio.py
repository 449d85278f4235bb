"""fio beside our reader: what it is asked, what is made of its answer, and whose turn it is. Most need no fio."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.io import markdown
from flashinfer.bench.fio import Fio, arguments, as_slice, find_fio
from flashinfer.bench.io import measure
from flashinfer.bench.io_figures import Combination, Slice, summary
from flashinfer.cli import main
from flashinfer.errors import PlatformError
from flashinfer.units import KIB, MIB

REPORT = {
    "jobs": [
        {
            "read": {
                "io_bytes": 500_000_000,
                "runtime": 250,
                "clat_ns": {"percentile": {"50.000000": 2_000_000, "99.000000": 9_000_000}},
            },
            "usr_cpu": 2.0,
            "sys_cpu": 3.0,
            "job_runtime": 4000,  # 16 jobs of 250 ms
        }
    ]
}
SMALL = ["--file-size", "1MiB", "--seconds", "0.01", "--rounds", "2", "--chunk", "64KiB", "--pattern", "random"]


def options(path: Path, c: Combination) -> dict[str, str]:
    return dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments(path, c, 0.25))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a:b"
    path.write_bytes(os.urandom(MIB))
    return path


def test_one_job_of_io_uring_or_a_job_for_each_thread(file: Path) -> None:
    ring = options(file, Combination("random", 16 * KIB, 32, "io_uring"))
    assert (ring["ioengine"], ring["iodepth"], ring["numjobs"]) == ("io_uring", "32", "1")
    pool = options(file, Combination("random", 16 * KIB, 32, "threads"))
    assert (pool["ioengine"], pool["iodepth"], pool["numjobs"]) == ("psync", "1", "32")
    for job in (ring, pool):
        assert (job["rw"], job["bs"], job["direct"], job["runtime"]) == ("randread", "16384", "1", "250ms")
        assert job["filename"].endswith(r"a\:b")


@pytest.mark.parametrize("reader", ["io_uring", "threads"])
def test_in_order_every_job_stays_in_its_share_of_the_file(file: Path, reader: str) -> None:
    chunk, threads = 48 * KIB, 3
    shares = []
    for _ in range(50):
        job = options(file, Combination("sequential", chunk, threads, reader))  # type: ignore[arg-type]
        assert job["rw"] == "read"
        begin, step, size = (int(job[name]) for name in ("offset", "offset_increment", "size"))
        assert begin % chunk == size % chunk == 0 < size
        assert begin + (int(job["numjobs"]) - 1) * step + size <= MIB
        assert begin + size <= step
        shares.append(begin)
    assert len(set(shares)) > 1


def test_a_file_too_small_to_share_is_everybodys(file: Path) -> None:
    assert "offset" not in options(file, Combination("sequential", 512 * KIB, 3, "threads"))


def test_the_answer_is_a_slice() -> None:
    found = as_slice(REPORT, 100_000)
    assert found == Slice(500_000_000, 5000, 0.25, pytest.approx(0.2), 0.002, 0.009)
    assert found.mb_per_s == pytest.approx(2000)
    assert found.cpu_s_per_gb == pytest.approx(0.4)


def test_ratios_are_of_the_same_round() -> None:
    ours = [Slice(100, 1, seconds, 1, 0.1, 0.2) for seconds in (1, 2, 4)]
    fios = [Slice(100, 1, 2 * seconds, 2, 0.1, 0.2) for seconds in (1, 2, 4)]
    beside = summary(Combination("random", 1, 1), ours, fios).fio
    assert beside is not None
    assert (beside.speed, beside.speed_low, beside.speed_high, beside.cpu) == (2, 2, 2, 0.5)
    assert summary(Combination("random", 1, 1), ours).fio is None


@pytest.mark.parametrize("reader", ["auto", "threads"])
def test_the_rival_reads_the_same_and_goes_first_every_other_round(file: Path, reader: str) -> None:
    asked: list[Combination] = []
    said: list[str] = []

    def rival(c: Combination, seconds: float) -> Slice:
        asked.append(c)
        return Slice(1_000_000 * len(said), 1, seconds, 0.1, 0.1, 0.1)

    c = Combination("random", 64 * KIB, 2, reader)  # type: ignore[arg-type]
    measured = measure(file, [c], seconds=0.002, rounds=3, rival=rival, progress=said.append)
    if not measured.direct:
        pytest.skip("no direct reads here")
    assert len(asked) == 3
    assert {(a.pattern, a.chunk, a.threads) for a in asked} == {("random", 64 * KIB, 2)}
    assert {a.reader for a in asked} <= {"io_uring", "threads"}
    assert reader == "auto" or asked[0].reader == "threads"
    beside = measured.results[0].fio
    assert beside is not None
    assert beside.low < beside.mb_per_s < beside.high


def test_turns_alternate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    one = Slice(1, 1, 1, 1, 1, 1)
    monkeypatch.setattr("flashinfer.bench.io._Run.slice", lambda *_: turns.append("ours") or one)
    c = Combination("random", 64 * KIB, 2)
    measured = measure(file, [c], seconds=1, rounds=3, rival=lambda *_: turns.append("rival") or one)
    if not measured.direct:
        pytest.skip("no direct reads here")
    assert turns == ["ours", "rival", "rival", "ours", "ours", "rival"]


def test_a_rival_of_direct_reads_is_not_asked_for_buffered_ones(file: Path) -> None:
    c = Combination("random", 64 * KIB, 2)
    measured = measure(file, [c], seconds=0.001, rounds=1, direct=False, rival=lambda *_: pytest.fail("asked"))
    assert measured.results[0].fio is None


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program called fio, the first on the PATH."""
    program = folder / "bin" / "fio"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_the_command_with_fio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = f"echo 'note: something'; echo '{json.dumps(REPORT)}'"
    stand_in(tmp_path, monkeypatch, f"if [ $1 = --version ]; then echo fio-9; else {answer}; fi")
    assert main(["bench", "io", str(tmp_path), *SMALL, "--threads", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fio"] == "fio-9"
    if said["direct"]:
        [row] = said["results"]
        assert row["fio"]["mb_per_s"] == pytest.approx(2000)
        assert row["fio"]["speed_low"] <= row["fio"]["speed"] <= row["fio"]["speed_high"]
    assert main(["bench", "io", str(tmp_path), *SMALL, "--threads", "2"]) == 0
    assert "fio-9" in capsys.readouterr().out


def test_the_markdown_of_a_report(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(file), "--seconds", "0.01", "--rounds", "1", "--chunk", "64KiB", "--threads", "3",
                 "--pattern", "random", "--no-fio", "--json"]) == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    rows = markdown(said).splitlines()
    assert rows[-1].startswith("| random | 64 KiB | 3 |")
    assert rows[-3].count("|") == rows[-2].count("|") == 14
    fios = {**said["results"][0], "speed": 1.5, "speed_low": 1.25, "speed_high": 2, "cpu": 0.5}
    said["results"][0]["fio"] = fios
    assert markdown(said).splitlines()[-1].endswith("| 150 % (125-200) | 0.50 |")
    assert markdown(said).splitlines()[-1].count("|") == 14


def test_a_fio_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, monkeypatch, "echo 'engine io_uring not loadable' >&2; exit 1")
    assert main(["bench", "io", str(tmp_path), *SMALL]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "engine io_uring not loadable; measure without it (--no-fio)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_fio_that_never_ends_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(PlatformError, match=r"does not run: .*timed out.*--no-fio"):
        Fio("fio", file).slice(Combination("random", 4096, 1, "io_uring"), 1.0)


def test_fio_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", "io", str(tmp_path), *SMALL, "--fio"]) == 2
    assert "fio on the PATH" in capsys.readouterr().err
    assert main(["bench", "io", str(tmp_path), *SMALL, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fio"] is None


def test_buffered_reads_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", str(tmp_path), *SMALL, "--fio", "--buffered"]) == 2
    assert "--buffered" in capsys.readouterr().err


@pytest.mark.skipif(find_fio() is None, reason="fio is not installed")
@pytest.mark.parametrize("pattern", ["random", "sequential"])
def test_the_real_one(file: Path, pattern: str) -> None:
    fio = Fio(find_fio() or "", file)
    assert fio.version().startswith("fio-")
    found = fio.slice(Combination(pattern, 64 * KIB, 2, "threads"), 0.02)  # type: ignore[arg-type]
    assert found.bytes == found.reads * 64 * KIB > 0
    assert 0 < found.p50_s <= found.p99_s
