"""Synthetic checkpoints: what was planted is what the engine sees, and transformers agrees with the engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import flashinfer
from benchmarks.planted.build import write_planted
from benchmarks.planted.cli import main
from benchmarks.planted.measure import Layer, measure_checkpoint, measure_store
from benchmarks.planted.shapes import FIRST_WORD, SHAPES
from benchmarks.planted.statistics import FIRED, Statistics, independent, like_trained, new_share, window_shares
from benchmarks.planted.text import ids_of, pseudo_text, token_ids
from flashinfer import pack
from flashinfer.engine import Model
from flashinfer.recording import open_recording

TOKENS, SAMPLE = 160, 300


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    store: Path
    asked: Statistics
    ids: list[int]
    layers: list[Layer]
    """As the engine ran it."""


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-opt"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    shape = replace(SHAPES[request.param], layers=2)
    asked = FIRED[shape.family]
    assert write_planted(root / "checkpoint", shape, asked) == shape.weight_bytes()
    pack(root / "checkpoint", root / "store")
    ids = ids_of(None, shape.vocab, SAMPLE + TOKENS, seed=5)
    layers = measure_store(root / "store", ids, TOKENS, predicted=[1])
    return Made(root / "checkpoint", root / "store", asked, ids, layers)


def test_the_engine_sees_what_was_asked(made: Made) -> None:
    asked, (alone, new_alone) = made.asked, independent(made.asked.density)
    for layer in made.layers:
        seen = layer.summary()
        assert abs(1 - seen["sparsity"] - asked.density) < 0.02
        assert 0.7 * asked.window_share < seen["window_shares"][4] < min(1.35 * asked.window_share, 0.95 * alone)
        assert 0.6 * asked.new_share < seen["new_share"] < min(1.4 * asked.new_share, 0.85 * new_alone)
        assert 0.3 < seen["hot_share"] < 0.65


def test_firings_are_predictable_from_little_of_the_input(made: Made) -> None:
    assert not made.layers[0].predictors
    best = made.layers[1].predictors[128]
    assert best["recall"] == pytest.approx(0.95, abs=0.01)
    assert best["named_share"] < 6 * made.asked.density
    assert best["recall_at_zero"] > 0.35
    assert best["precision_at_zero"] > 0.6


def test_a_checkpoint_and_its_store_measure_the_same(made: Made) -> None:
    own = measure_checkpoint(made.checkpoint, made.ids, TOKENS)
    for mine, engine in zip(own, made.layers, strict=True):
        assert (mine.fired != engine.fired).mean() < 1e-3


def test_transformers_agrees_with_the_engine(made: Made) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = made.ids[:48]
    oracle = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    with Model.open(made.store) as model:
        logits = model.logits(model.session(), ids)
    assert np.abs(logits - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_command_makes_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("a", "b"):
        main(["make", "tiny-llama", str(tmp_path / out), "--layers", "1", "--sparsity", "0.9", "--seed", "3"])
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert len({hashlib.sha256(content).digest() for content in files}) == 1
    text = tmp_path / "text"
    text.write_text(pseudo_text(400, seed=9))
    main(["measure", str(tmp_path / "a"), "--text", str(text), "--tokens", "100", "--sample", "140"])
    assert "asked   90.0%     29.5%    3.25%      45%" in capsys.readouterr().out
    main(["ids", str(tmp_path / "a"), "--text", str(text), "--tokens", "7"])
    assert [int(i) for i in capsys.readouterr().out.split()] == token_ids(text.read_text(), 2048)[:7]


def test_silu_has_nothing_planted_and_runs(tmp_path: Path) -> None:
    main(["make", "tiny-llama", str(tmp_path / "made"), "--activation", "silu", "--layers", "1"])
    pack(tmp_path / "made", tmp_path / "store")
    with Model.open(tmp_path / "store") as model:
        assert not model.facts.sparse
        assert np.isfinite(model.step(model.session(), [300, 301])).all()


def test_reuse_is_halved_towards_independence() -> None:
    full, half, none = FIRED["llama"], FIRED["llama"].with_reuse(0.5), independent(FIRED["llama"].density)
    assert full.with_reuse(1.0) == full
    assert (half.density, half.hot_share) == (full.density, full.hot_share)
    assert half.window_share == pytest.approx((full.window_share + none[0]) / 2)
    assert half.new_share == pytest.approx((full.new_share + none[1]) / 2)
    with pytest.raises(ValueError, match="at most 1"):
        full.with_reuse(0.0)


def test_the_command_records_what_measure_sees(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(pseudo_text(300, seed=9))
    run = [str(made.store), str(tmp_path / "r.act"), "--text", str(text), "--tokens", "40", "--prompt", "50"]
    main(["record", *run])
    found = open_recording(tmp_path / "r.act")
    seen = measure_store(made.store, token_ids(text.read_text(), SHAPES["tiny-llama"].vocab)[:90], 40)
    for i, layer in enumerate(seen):
        steps = list(found.layer(i))
        assert [len(step) for step in steps] == [50, *[1] * 40]
        assert [step[0].tolist() for step in steps[1:]] == [np.flatnonzero(row).tolist() for row in layer.fired]
    with pytest.raises(SystemExit):
        main(["record", str(made.checkpoint), str(tmp_path / "r.act")])
    assert "is a checkpoint" in capsys.readouterr().err


def test_a_real_models_text_is_read_with_its_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 5)
    pack(Path(flashinfer.__file__).parent / "_demo", tmp_path / "demo")
    main(["record", *(str(tmp_path / name) for name in ("demo", "r.act")), "--tokenizer", "--text",
          str(tmp_path / "text"), "--tokens", "20", "--prompt", "9"])  # fmt: skip
    assert sum(map(len, open_recording(tmp_path / "r.act").layer(4))) == 29
    for text in ([], ["--text", str(tmp_path / "text")]):
        with pytest.raises(SystemExit):
            main(["record", str(tmp_path / "demo"), str(tmp_path / "r.act"), "--tokenizer", *text])
    err = capsys.readouterr().err
    assert "needs a --text" in err
    assert "of the 264 tokens" in err


def test_impossible_wishes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["make", "tiny-opt", str(tmp_path), "--sparsity", "0.97", "--window-share", "0.24"])
    assert stop.value.code == 1
    assert "holds between 3.0% and 14.1%" in capsys.readouterr().err
    assert like_trained(0.95).window_share == pytest.approx(0.16, abs=0.01)


def test_equal_words_are_equal_tokens() -> None:
    ids = token_ids("One word, another word. internationalisation", 2048)
    assert len(ids) == 9
    assert ids[1] == ids[4]
    assert min(ids) >= FIRST_WORD
    share = max(np.bincount(token_ids(pseudo_text(2000), 2048))) / 2000
    assert 0.02 < share < 0.15


def test_windows_by_hand() -> None:
    fired = np.zeros((7, 4), dtype=bool)
    fired[0, 0] = fired[6, 1] = True
    assert window_shares(fired, 2) == pytest.approx([2 / 28, 2 / 24])
    assert new_share(fired) == pytest.approx(2 / 8 - 2 / 12)
