"""pack, inspect and verify on the command line: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashinfer.cli import main
from flashinfer.store import open_store
from tests.plain_checkpoint import OPT, write_checkpoint
from tests.store_contents import manifest_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", OPT)


@pytest.fixture
def store(checkpoint, tmp_path, capsys) -> Path:
    assert main(["pack", str(checkpoint), str(tmp_path / "store")]) == 0
    capsys.readouterr()
    return tmp_path / "store"


def damage(store: Path) -> None:
    path = store / manifest_of(store)["neurons"]["name"]
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("quant", ["nope", "ffn", "ffn=nope", "nf4,int8", "what=int8", ""])
def test_a_quant_that_is_none(checkpoint, tmp_path, capsys, quant):
    assert main(["pack", str(checkpoint), str(tmp_path / "s"), "--quant", quant]) == 2
    err = capsys.readouterr().err
    assert "--quant" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_pack(checkpoint, tmp_path, capsys):
    assert main(["pack", str(checkpoint), str(tmp_path / "s"), "--quant", "f16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 's'}: opt, ")
    assert out.count("\n") == 1
    assert err == ""
    assert open_store(tmp_path / "s").manifest.tensors["embed.weight"].codec == "f16"


def test_pack_json(checkpoint, tmp_path, capsys):
    assert main(["pack", str(checkpoint), str(tmp_path / "s"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert report["weight_bytes"] == open_store(tmp_path / "s").manifest.weight_bytes()


def test_pack_force_and_layout(checkpoint, store, capsys):
    arguments = ["pack", str(checkpoint), str(store)]
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    layout = Path(__file__).parents[2] / "layouts" / "opt.toml"
    assert main([*arguments, "--force", "--layout", str(layout)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "org/model", "s"], "huggingface-cli download org/model"),
        (["inspect", "org/model"], "hub name"),
        (["verify", "nothing"], "nothing does not exist"),
        (["inspect", "checkpoint"], "run `flashinfer pack checkpoint STORE` first"),
    ],
)
def test_expected_errors_are_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_wrong_usage(checkpoint, tmp_path, capsys):
    assert main(["pack", str(checkpoint), str(tmp_path / "s"), "--quant", "int3"]) == 2
    assert "int3" in capsys.readouterr().err


def test_inspect(store, capsys):
    assert main(["inspect", str(store)]) == 0
    out = capsys.readouterr().out
    for text in (
        "opt, ",
        "2 layers, hidden 16, FFN 21",
        "f32",
        "decision matrix up in the dense file",
        "dense-",
        "neurons-",
    ):
        assert text in out


def test_inspect_json(store, capsys):
    assert main(["inspect", str(store), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    m = open_store(store).manifest
    assert summary["schema_version"] == 1
    assert summary["facts"]["hidden_size"] == 16
    # every weight of the plain OPT is f32: four bytes each
    assert summary["parameters"] * 4 == summary["weight_bytes"] == m.weight_bytes()
    assert summary["dense_bytes"] + summary["neuron_bytes"] == m.weight_bytes()
    assert 0 < summary["neuron_padding"] < 1
    assert len(summary["layers"]) == 2
    assert {f["name"] for f in summary["files"]} == {f.name for f in m.files()}


def test_verify(store, capsys):
    assert main(["verify", str(store)]) == 0
    assert "sound" in capsys.readouterr().out
    damage(store)
    assert main(["verify", str(store)]) == 1
    out, err = capsys.readouterr()
    assert "layer 0 (neurons) is damaged" in out
    assert "layer 0 (neurons) is damaged" in err


def test_verify_json(store, capsys):
    damage(store)
    assert main(["verify", str(store), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["schema_version"], result["sound"]) == (1, False)
    assert [d["region"] for d in result["damaged"]] == ["layer 0 (neurons)"]
