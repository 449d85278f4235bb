"""`flashinfer eval --against STORE`: the same model packed otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flashinfer.cli import main
from flashinfer.pack import pack
from tests.checkpoints import make_llama
from tests.tune.calibrating import make_store, words

QUICK = ("--tokens", "64", "--context", "32", "--decode-tokens", "2", "--rounds", "1", "--greedy-tokens", "4")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A store as it is, the same in eight bits, and a text."""
    path = tmp_path_factory.mktemp("against")
    first = make_store(path, "relu")
    checkpoint = next(p.parent for p in path.rglob("config.json"))
    pack(checkpoint, path / "int8.flash", quant="int8g32,embed=f32,head=f32")
    (path / "text.txt").write_text(words(400))
    return first, path / "int8.flash", path / "text.txt"


def test_another_store_is_the_reference(stores: tuple[Path, Path, Path], capsys) -> None:
    first, second, text = stores
    given = ["eval", str(second), "--text", str(text), *QUICK]
    assert main([*given, "--against", str(first), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    reference, row = found["rows"]
    assert found["against"] == reference["predictor"] == first.name
    assert row["predictor"] == "exact"
    assert 0 < row["kl"] < 0.1
    assert row["increase"] == pytest.approx(row["perplexity"] / reference["perplexity"] - 1)
    assert row["greedy"]["of"] == 4
    assert reference["decode"]["seconds"] > 0 < row["decode"]["seconds"]
    assert main([*given, "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["rows"]
    assert math.isclose(alone["perplexity"], row["perplexity"])
    assert main(["eval", str(first), "--text", str(text), *QUICK, "--json"]) == 0
    (base,) = json.loads(capsys.readouterr().out)["rows"]
    assert base["perplexity"] == reference["perplexity"]


def test_a_store_against_itself(stores: tuple[Path, Path, Path], capsys) -> None:
    first, _, text = stores
    assert main(["eval", str(first), "--text", str(text), *QUICK, "--against", str(first), "--json"]) == 0
    _, row = json.loads(capsys.readouterr().out)["rows"]
    assert (row["increase"], row["top1_agreement"]) == (0, 1)
    assert abs(row["kl"]) < 1e-6


def test_another_model_is_refused(stores: tuple[Path, Path, Path], tmp_path: Path, capsys) -> None:
    first, _, text = stores
    pack(make_llama(tmp_path / "c", vocab_size=77), tmp_path / "other.flash")
    capsys.readouterr()
    for against in (tmp_path / "other.flash", tmp_path / "missing.flash"):
        assert main(["eval", str(first), "--text", str(text), *QUICK, "--against", str(against)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert str(against) in err
