"""`flashinfer bench generate`: what is reported, beside what was predicted and what the bytes alone take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashinfer.bench.basis import Basis
from flashinfer.bench.generate import COMPARISON, Setting, compare, summary
from flashinfer.cli import main
from flashinfer.cli.bench_generate import comparison_table, promise_table
from flashinfer.config import Cap, DiskCurve, Rates, RunConfig
from tests.tune.calibrating import make_store

TOKENS = 3
BASIS = Basis(DiskCurve(1e-5, 1e9, 1e-4), Rates(dram=2e10), "made up", "made up", disk_measured=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("bench"), "relu")


def test_the_bound_is_what_the_bytes_take(store: Path) -> None:
    settings = [Setting("cached", "bytes"), COMPARISON[-1]]
    (few, naive), *more = zip(
        *compare(
            store, [1, 5, 7], tokens=TOKENS, rounds=2, run=RunConfig(), cap=Cap(memory=10**9), settings=settings,
            basis=BASIS,
        ),
        strict=True,
    )  # fmt: skip
    assert len(more) == 1
    for s in (few, naive):
        assert s.predicted_ms is not None
        assert s.bound_ms is not None
        assert s.token_ms == pytest.approx(1e3 / s.tokens_per_second)
    disk = BASIS.disk.seconds(naive.reads, naive.bytes_read, min(RunConfig().io.in_flight, naive.reads))
    assert naive.bound_ms is not None
    assert naive.bound_ms > 1e3 * disk > 0
    assert naive.predicted_bytes == pytest.approx(naive.bytes_read, rel=0.05)
    assert few.bytes_read == 0, "all of it is in memory"
    assert few.predicted_bytes == 0
    rows = [summary([s]) for s in (few, naive)]
    assert [len(table(rows).rows) for table in (promise_table, lambda r: comparison_table(r, ""))] == [2, 2]


def test_without_a_basis_nothing_is_promised(store: Path) -> None:
    ((s,),) = compare(
        store, [1, 5], tokens=1, rounds=1, run=RunConfig(), cap=Cap(memory=10**9), settings=COMPARISON[:1]
    )
    assert (s.predicted_ms, s.predicted_first_token_s, s.bound_ms) == (None, None, None)


@pytest.mark.parametrize("arguments", [[], ["--predictor", "exact", "--predictor", "all"]])
def test_the_command(store: Path, arguments: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    given = ["bench", "generate", str(store), "-n", "2", "--rounds", "2", "-p", "a b", *arguments]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "x bound" in out
    assert "..." not in out.replace("…", "...")
    assert main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["predictor"] for row in report["rows"]] == (arguments[1::2] or ["exact"] * 5)
    assert [len(samples) for samples in report["samples"]] == [2] * len(report["rows"])
    assert report["basis"]["rates"]["dram"] > 0
