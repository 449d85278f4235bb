"""What commands make of a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from flashinfer import pack
from flashinfer.choice import parse_predictor
from flashinfer.cli.options import parse_predictor_options
from tests.cli.command_line import run
from tests.families import make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    pack(make("qwen2_moe-mixed", root / "checkpoint"), root / "store")
    (root / "text.txt").write_text("a few words")
    return root / "store"


def test_inspect(store: Path) -> None:
    done = run("inspect", str(store))
    assert "2 of 6 for each token, 24 neurons each, 36 neurons shared by all; 2 of 3 layers are dense" in done.stdout
    facts = json.loads(run("inspect", str(store), "--json").stdout)["facts"]
    assert facts["experts"]["dense"] == [0, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--predictor", "low-rank"), "there is no predictor to make"),
        (("--quant", "nf4"), "only `flashinfer pack --quant` can quantise"),
    ],
)
def test_what_it_needs_not(store: Path, more: tuple[str, ...], message: str) -> None:
    done = run("calibrate", str(store), "--text", str(store.parent / "text.txt"), *more)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_experts_per_token() -> None:
    assert parse_predictor_options("exact", "1%", None) == ("exact", 0.01)
    assert parse_predictor_options("exact", "1%", 3) == ("router:3", 0.01)
    with pytest.raises(typer.BadParameter, match="only the router chooses experts"):
        parse_predictor_options("threshold", "1%", 3)


@pytest.mark.parametrize("name", ["router:", "router:0", "router:-1", "router:two", "exact:2"])
def test_no_such_predictor(name: str) -> None:
    with pytest.raises(ValueError, match="router with :EXPERTS"):
        parse_predictor(name)
