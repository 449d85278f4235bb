"""`benchmarks/caps.py` on a tiny model: ours and the plain loop, each in a cgroup; llama.cpp is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import caps
from benchmarks.peers.cgroup import NoCgroupError, fresh_group
from benchmarks.peers.contest import Run
from benchmarks.peers.tables import markdown, summarize
from benchmarks.planted.shapes import shape_named
from benchmarks.planted.write import write_random
from flashinfer import pack
from flashinfer.config import DiskCurve
from flashinfer.units import MIB

CAP = 700_000_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        with fresh_group(CAP):
            pass
    except NoCgroupError as e:
        pytest.skip(str(e))
    root = tmp_path_factory.mktemp("caps")
    write_random(root / "hf", shape_named("tiny-llama", layers=2, activation="silu"))
    pack(root / "hf", root / "store")
    return root


def test_the_tables_of_a_tiny_model(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caps, "CURVE_SECONDS", 0.01)
    arguments = [str(models / "store"), "--checkpoint", str(models / "hf"), "--caps", str(CAP), "--rounds", "1"]
    assert caps.main([*arguments, "-n", "3", "--prompt", "5", "--probe", "0.02", "--out", str(tmp_path)]) == 0
    [model] = json.loads((tmp_path / "caps.json").read_text())["models"]
    ours, naive = model["tables"]["rows"]
    for row in (ours, naive):
        assert row["endings"] == {"ok": 1}
        assert row["tokens"] == 3
        assert 0 < row["peak"] < CAP
        assert row["s_per_token"] > 0
    assert naive["bytes_per_token"] > 4e6  # all of its layers and the head, for every token
    [prediction] = model["tables"]["predictions"]
    assert prediction["bytes_ledger"] == prediction["bytes_predicted"] == 0  # it fits
    logits = {row["contender"]: row for row in model["tables"]["logits"]}
    assert logits["flashinfer"]["identical"]
    assert logits["naive"]["largest_difference"] < 0.01 * logits["naive"]["largest_logit"]
    text = (tmp_path / "caps.md").read_text()
    assert "Left out: llama.cpp (mmap)" in text
    assert str(models) not in text


def test_runs_that_came_to_nothing_are_said() -> None:
    refused = Run("flashinfer", 10**9, "refused", disk=[2e9], end={"floor": 1_234_000_000})
    killed = Run("naive", 10**9, "OOM-killed", 999_000_000, None, 0.5, 1.0, [2.0], [10**9], [2e9])
    fine = replace(killed, status="ok", tokens=[3.0, 5.0], device=[10**9, 3 * 10**9])
    tables = summarize([refused, killed, fine], frozenset({"flashinfer", "naive"}))
    assert tables["predictions"] == tables["logits"] == []
    text = markdown({"facts": [], "models": [{"label": "m", "notes": [], "tables": tables}]})
    assert "| 1 | flashinfer | 0.000 | - | - | - | - | 2.00 | refused (floor 1.234 GB) |" in text
    assert "| 1 | naive | 0.999 | 3.00 (2.00-5.00) | - | 1.50 | 1.5 | 2.00 | OOM-killed 1 of 2, ok 1 of 2 |" in text


def test_a_curve_at_a_rate_gives_that_rate() -> None:
    curve = caps.at_rate(DiskCurve(), 1.3e9, MIB)
    assert MIB / curve.seconds(1, MIB, 8) == pytest.approx(1.3e9)
