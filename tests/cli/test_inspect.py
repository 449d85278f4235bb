"""`inspect` on stores that were calibrated: version, where the decision lies, predictors, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashinfer.cli import main
from flashinfer.pack import pack
from flashinfer.store import Store, open_store
from tests.checkpoints import make_llama
from tests.families import make
from tests.plain_checkpoint import OPT, write_checkpoint
from tests.quantised_checkpoints import gptq, quantised
from tests.store.predicted import add_predictors, calibration_for


@pytest.fixture
def bundled(tmp_path: Path) -> Store:
    pack(write_checkpoint(tmp_path / "checkpoint", OPT), tmp_path / "store", decision="bundled")
    return add_predictors(open_store(tmp_path / "store"))


def test_for_people(bundled, capsys):
    assert main(["inspect", str(bundled.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[:20].strip(): line[21:] for line in lines}
    assert "(version 3, by flashinfer-offload" in found["store"]
    assert "decision matrix up in the bundles" in found["layers 0-1"]
    assert found["predictor certified"] == "1.72 KiB in 2 layers (int8g32)"
    assert found["predictor low-rank"] == "4.79 KiB in 2 layers (rank 32, f16)"
    assert found["predictor threshold"] == "168 B in 2 layers"
    assert found["calibration"] == ("1000 tokens, 200 held out; neurons a token needs: exact 25.0 %, low-rank 50.0 %")
    assert found["low-rank:0.95"] == "recall 93.8 %, names 25.0 %, perplexity 12.5 (exact 12)"
    assert found["low-rank:0.99"] == "recall 98.4 %, names 50.0 %, perplexity 12.25 (exact 12), the default"
    assert found["threshold:0.5"].endswith(", the default")


def test_json(bundled, capsys):
    assert main(["inspect", str(bundled.root), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    m, calibration = bundled.manifest, calibration_for()
    assert summary["store_version"] == 3
    assert {layer["decision"] for layer in summary["layers"]} == {"bundled"}
    assert sum(p["bytes"] for p in summary["predictors"].values()) == m.predictor_bytes()
    assert {name: p["ranks"] for name, p in summary["predictors"].items()} == {
        "certified": [], "low-rank": [32], "threshold": []
    }  # fmt: skip
    # what predictors add is not the model's
    assert summary["dense_bytes"] + summary["neuron_bytes"] == summary["weight_bytes"] == m.weight_bytes()
    assert summary["parameters"] * 4 == summary["weight_bytes"]
    assert set(summary["codecs"]) == {"f32"}
    assert {f["name"] for f in summary["files"]} == {f.name for f in m.files()}
    levels = summary["calibration"]["levels"]
    assert [level["chosen"] for level in levels] == [False, True, True]
    for level, measured in zip(levels, calibration.levels, strict=True):
        assert all(level[name] == getattr(measured, name) for name in ("predictor", "target", "recall", "perplexity"))
    assert summary["calibration"]["mean_density"] == {"exact": 0.25, "low-rank": 0.5}


@pytest.fixture
def quantised_before(tmp_path: Path) -> Path:
    source = make_llama(tmp_path / "source", hidden_size=64, intermediate_size=128)
    quantised(source, tmp_path / "theirs", tmp_path / "values", gptq(32))
    pack(tmp_path / "theirs", tmp_path / "store", quant="layers.0.attn.q.weight=f16")
    return tmp_path / "store"


def test_what_became_of_codes_for_people(quantised_before, capsys):
    assert main(["inspect", str(quantised_before)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("quantised before")]
    scheme = "quantised before     gptq 4-bit, groups of 32; "
    assert lines == [
        f"{scheme}rounded again, to f16: 1 layers.*.attn.q.weight",
        f"{scheme}codes kept as int4g32: 3 layers.*.attn.k.weight, 3 layers.*.attn.v.weight, 3 layers.*.attn.o.weight, "
        "3 layers.*.ffn.gate.weight, 3 layers.*.ffn.up.weight, 2 layers.*.attn.q.weight",
        f"{scheme}rounded again, to int4g32iz: 3 layers.*.ffn.down.weight",
    ]


def test_what_became_of_codes_as_json(quantised_before, capsys):
    assert main(["inspect", str(quantised_before), "--json"]) == 0
    origins = json.loads(capsys.readouterr().out)["origins"]
    assert {(o["kept"], o["codec"], sum(o["matrices"].values())) for o in origins} == {
        (False, "f16", 1), (True, "int4g32", 17), (False, "int4g32iz", 3)
    }  # fmt: skip
    assert {o["scheme"] for o in origins} == {"gptq 4-bit, groups of 32"}


def test_a_store_that_was_never_calibrated(tmp_path, capsys):
    pack(write_checkpoint(tmp_path / "checkpoint", OPT), tmp_path / "store")
    assert main(["inspect", str(tmp_path / "store"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["predictors"], summary["calibration"]) == ({}, None)
    assert main(["inspect", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    assert "predictor" not in out
    assert "calibration" not in out


def test_a_damaged_calibration_is_one_line(bundled, capsys):
    path = bundled.path_of(bundled.manifest.sections["calibration"])
    path.write_bytes(path.read_bytes().replace(b'"tokens": 1000', b'"tokens": -999'))
    assert main(["inspect", str(bundled.root)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"{path.name} does not match its checksum" in err


@pytest.mark.parametrize(
    ("case", "context"),
    [
        ("mistral-window", "96 tokens, rotary positions, attention window 24"),
        ("gemma2", "96 tokens, rotary positions, attention window 24 in 2 of 3 layers"),
        ("bloom", "2048 tokens, ALiBi positions"),
        ("gpt2", "96 tokens, learned positions"),
        ("deepseek_v3", "hidden 40, FFN 107, 4 heads, keys and values by way of 20 values"),
    ],
)
def test_how_far_attention_looks(case, context, tmp_path, capsys):
    pack(make(case, tmp_path / "checkpoint"), tmp_path / "store")
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert f"{context}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("case", "said"), [("bamboo", "drelu, gated (sparse"), ("gemma", "gelu_tanh, gated (dense")])
def test_what_is_sparse(case, said, tmp_path, capsys):
    pack(make(case, tmp_path / "checkpoint"), tmp_path / "store")
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert said in capsys.readouterr().out
