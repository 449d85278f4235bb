"""Activations with a threshold of their own, and those that rectify up's products, through a whole calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.model.observe import Seen
from flashinfer.store import open_store
from tests.checkpoints import make_llama
from tests.tiny_tokenizers import tiny_sentencepiece
from tests.tune.calibrating import PROMPT, SIZE, assert_same, calibrated, logits

SAYS: dict[str, dict[str, Any]] = {
    "fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "shifted_relu": {"hidden_act": "shifted_relu", "hidden_act_param": 0.3},
    "drelu": {"architectures": ["BambooForCausalLM"], "sliding_window": 9},
}


@pytest.fixture(scope="module", params=SAYS)
def store(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = make_llama(root / "checkpoint", intermediate_size=192, hidden_act="relu", dtype="float16", **SIZE)
    tiny_sentencepiece(checkpoint)
    said = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(said | SAYS[request.param]))
    pack(checkpoint, root / "plain")
    pack(checkpoint, root / "store")
    calibrated(root / "store", text)
    assert open_store(root / "store").manifest.facts.activation == request.param
    return root / "store"


def test_certified_is_exact(store: Path) -> None:
    expected = logits(store.parent / "plain")
    assert_same(logits(store, "certified"), expected)
    assert_same(logits(store, "exact"), expected)


def test_who_fires_is_who_contributes(store: Path) -> None:
    """The observer's firings, the exact selection, and what exceeds the threshold are the same."""
    shares = []

    class Watching:
        def seen(self, layer: int, step: Seen) -> None:
            assert np.array_equal(step.active, step.gate > threshold)
            assert np.array_equal(step.active, step.needed)
            shares.append(step.active.mean())

    with Model.open(store.parent / "plain", context=64, run=RunConfig(predictor="exact")) as model:
        threshold = np.float32(model.facts.fires_above)
        model.observe(Watching())
        model.logits(model.session(), PROMPT)
    assert len(shares) == 2
    assert all(0.05 < share < 0.7 for share in shares)


def test_a_low_rank_level_runs(store: Path) -> None:
    found = logits(store, "low-rank")
    assert all(np.isfinite(values).all() for values in found)
