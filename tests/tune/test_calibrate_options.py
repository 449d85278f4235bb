"""What calibration can be told, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.errors import PredictorError, StoreBusyError, StoreError, TextError
from flashinfer.store import StoreUpdate, open_store, verify
from flashinfer.tune.calibrate import LEAST_TOKENS
from flashinfer.tune.options import Options
from flashinfer.tune.work import NAME
from tests.checkpoints import make_llama, make_opt
from tests.tune.calibrating import (
    KINDS,
    QUICK,
    assert_same,
    calibrated,
    contents,
    copy_of,
    logits,
    make_store,
    token_ids,
    words,
)

pytestmark = pytest.mark.usefixtures("quick_collections")


class TestOptions:
    def test_no_order(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["relu"], tmp_path / "store")
        calibrated(path, text, replace(QUICK, order=False))
        assert all((n.decision, n.permutation) == ("bundled", None) for n in open_store(path).manifest.layers)
        assert_same(logits(path), logits(packed["relu"]))
        moved = copy_of(packed["relu"], tmp_path / "moved")
        calibrated(moved, text)
        before = open_store(moved)
        assert any(n.permutation is not None for n in before.manifest.layers)
        calibrated(moved, text, replace(QUICK, order=False))
        for layer, n in enumerate(before.manifest.layers):
            now = open_store(moved)
            assert now.manifest.layers[layer].permutation == n.permutation
            if n.permutation is not None:
                assert np.array_equal(now.read_tensor(n.permutation), before.read_tensor(n.permutation))

    def test_certified_alone(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["opt"], tmp_path / "store")
        report = calibrated(path, text, replace(QUICK, make=("certified",)))
        assert (report.calibration.levels, report.calibration.chosen) == ((), {})
        assert [*report.calibration.statistics] == ["exact", "certified"]
        assert not any(".lowrank." in role for role in open_store(path).manifest.tensors)
        assert_same(logits(path, "certified"), logits(packed["opt"]))
        with pytest.raises(PredictorError, match="no low-rank predictor"):
            Model.open(path, run=RunConfig(predictor="low-rank"))

    def test_low_rank_brings_certified(self, packed: dict[str, Path]) -> None:
        options = replace(QUICK, make=("low-rank",)).suited(open_store(packed["relu"]).manifest)
        assert options.make == ("certified", "low-rank")

    def test_a_bundled_gated_model(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        """Thresholds are tested on all decision products: the matrix must be apart, whatever the records are."""
        apart = copy_of(packed["silu"], tmp_path / "apart")
        calibrated(apart, text)
        records = open_store(apart).manifest.layers[0].bundles_per_record
        path = make_store(tmp_path, "silu", decision="bundled", bundles_per_record=records)
        before = logits(path)
        calibrated(path, text)
        assert all(n.decision == "separate" for n in open_store(path).manifest.layers)
        assert_same(logits(path), before)
        assert all(np.isfinite(x).all() for x in logits(path, "threshold"))

    def test_records_of_the_density(self, text: Path, tmp_path: Path) -> None:
        """Where other record sizes suit what thresholds leave, the weights are written anew."""
        path = make_store(tmp_path, "silu", bundles_per_record=64)
        before = logits(path)
        calibrated(path, text)
        assert all(n.bundles_per_record < 64 for n in open_store(path).manifest.layers)
        assert_same(logits(path), before)

    @pytest.mark.parametrize(
        ("kind", "asked", "parts"),
        [
            ("relu", "threshold", ("a threshold predictor", "relu", "gated", "possible: certified, low-rank")),
            ("opt", "threshold", ("a threshold predictor", "relu", "plain", "possible: certified, low-rank")),
            ("silu", "low-rank", ("a low-rank predictor", "silu", "gated", "possible: threshold")),
            ("silu", "certified", ("a certified predictor", "silu", "gated", "possible: threshold")),
        ],
    )
    def test_what_does_not_suit(self, packed: dict[str, Path], text: Path, kind: str, asked: Any, parts) -> None:
        before = contents(packed[kind])
        with pytest.raises(PredictorError) as caught:
            calibrated(packed[kind], text, replace(QUICK, make=(asked,)))
        assert all(part in str(caught.value) for part in parts)
        assert contents(packed[kind]) == before

    @pytest.mark.parametrize("asked", [(), ("threshold",)])
    def test_a_model_that_needs_everyone(self, asked: Any, tmp_path: Path) -> None:
        pack(make_opt(tmp_path / "checkpoint", activation_function="gelu"), tmp_path / "store")
        with pytest.raises(PredictorError, match="gelu in a plain feed-forward layer") as caught:
            Options(make=asked).suited(open_store(tmp_path / "store").manifest)
        assert ("nothing to calibrate" in str(caught.value)) == (not asked)

    def test_factors_that_do_not_fit(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["relu"], tmp_path / "store")
        before = contents(path)
        with pytest.raises(PredictorError, match=r"do not fit .*raise --budget"):
            calibrated(path, text, replace(QUICK, share=0.001))
        assert contents(path) == before


class TestRefused:
    def test_a_text_of_less_than_two_windows(self, packed: dict[str, Path], tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text(words(12))
        with pytest.raises(TextError, match=r"short\.txt has \d+ tokens, calibration takes 80"):
            calibrated(packed["relu"], path)
        path.write_text(words(40))
        with pytest.raises(TextError, match="takes 128 at least; give a longer text, or a smaller --context"):
            calibrated(packed["relu"], path, replace(QUICK, context=64, tokens=256))
        assert not (packed["relu"] / NAME).exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_shortest_text_there_may_be(self, packed: dict[str, Path], kind: str, tmp_path: Path) -> None:
        path, store = tmp_path / "short.txt", copy_of(packed[kind], tmp_path / "store")
        for count in range(100):
            path.write_text(words(count))
            if len(token_ids(store, path)) >= LEAST_TOKENS:
                break
        report = calibrated(store, path, replace(QUICK, context=16))
        assert verify(open_store(store)) == []
        assert report.calibration.held_out == len(token_ids(store, path)) // 4
        assert report.calibration.statistics

    def test_someone_else_changes_it(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["relu"], tmp_path / "store")
        with StoreUpdate(open_store(path)), pytest.raises(StoreBusyError, match="being written by another process"):
            calibrated(path, text)
        assert not (path / NAME).exists()

    def test_no_tokenizer(self, text: Path, tmp_path: Path) -> None:
        pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
        with pytest.raises(StoreError, match="the store has no tokenizer"):
            calibrated(tmp_path / "store", text)
