"""Of a mixture of experts calibration counts whose experts come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.choice import Choice
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, PredictorError, TextError
from flashinfer.firing import firing_of
from flashinfer.model.observe import Seen
from flashinfer.store import open_store
from flashinfer.tune.calibrate import Report, calibrate
from flashinfer.tune.options import Options
from tests import families
from tests.tiny_tokenizers import tiny_sentencepiece
from tests.tune.calibrating import token_ids, words

BOS = 1
OPTIONS = Options(tokens=112, held_out=8, context=32)
LAYERS, COUNT, SIZE, CHOSEN = 3, 6, 24, 2
"""Of the model; its layer 1 has experts, 36 neurons shared by all beside them, the others are dense."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    case = families.CASES["qwen2_moe-mixed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CASES, "worded", replace(case, config=case.config | {"vocab_size": 340}))
        tiny_sentencepiece(families.make("worded", root / "checkpoint"))
    (root / "text.txt").write_text(words(400))
    pack(root / "checkpoint", root / "store")
    return root / "store"


def run(store: Path, options: Options = OPTIONS, cap: Cap | None = None, text: str = "text.txt") -> Report:
    return calibrate(
        store, store.parent / text, options, cap=cap or Cap(weight_memory=10**9), run=RunConfig(), device="cpu",
        progress=lambda what, done, total: None,
    )  # fmt: skip


class Chosen:
    """Keeps the experts of a layer's tokens, one by one."""

    def __init__(self) -> None:
        self.of_tokens: list[set[int]] = []

    def seen(self, layer: int, step: Seen) -> None:
        if layer == 1:
            self.of_tokens += [set((np.flatnonzero(row) // SIZE).tolist()) for row in step.active]


def test_what_is_counted_is_what_the_router_chooses(store: Path) -> None:
    report, chosen = run(store), Chosen()
    with Model.open(store, context=32) as model:
        ids = token_ids(store, store.parent / "text.txt")[:120]
        model.observe(chosen)
        session = model.session()
        for at in range(0, len(ids), 31):
            session.truncate(0)
            for token in [BOS, *ids[at : at + 31]]:
                model.step(session, [token])
    found = report.calibration.statistics["router"][1]
    units = COUNT + 2  # one and a half units are shared
    assert found.density == pytest.approx((CHOSEN + 2) / units)
    fresh = [len(now - before) for before, now in zip(chosen.of_tokens, chosen.of_tokens[1:], strict=False)]
    assert found.new[1] == pytest.approx(np.mean(fresh) / units)
    pairs = [len(now | before) for before, now in zip(chosen.of_tokens, chosen.of_tokens[1:], strict=False)]
    assert found.union[1] == pytest.approx(np.mean(pairs) / units)
    assert found.missing[0] == pytest.approx(found.density)
    assert found.missing[-1] == 0
    dense = report.calibration.statistics["router"][0]
    assert dense.density == 1.0
    assert len(chosen.of_tokens) == report.calibration.tokens + 4 == 124


def test_plans_use_it(store: Path) -> None:
    run(store)
    opened = open_store(store)
    m, calibration = opened.manifest, opened.calibration()
    assert calibration is not None
    dense, routed, _ = firing_of(m, Choice("router"), calibration)
    assert (dense.density, dense.source) == (1.0, "assumed")
    assert routed.source == "measured"
    for kept in (0.0, 0.25, 0.5, 0.75):
        missing = calibration.statistics["router"][1].missing[round(16 * kept)]
        assert routed.missing(1, 8, kept) == missing
    more = firing_of(m, Choice("router", experts=4), calibration)[1]
    assert more.measured is not None
    assert more.measured.density == pytest.approx(routed.measured.density * (4 * 24 + 36) / (2 * 24 + 36))  # type: ignore[union-attr]
    without = firing_of(m, Choice("router"))[1]
    assert without.source == "assumed"
    assert 0 < routed.needed(2) < 1
    assert routed.needed(1) < routed.needed(128) <= 1
    assert 0 < routed.missing(128, 8, 0.5) < 1


def test_the_model_stays_as_it_was(store: Path) -> None:
    before = open_store(store).manifest
    with Model.open(store, context=32) as model:
        expected = model.logits(model.session(), [5, 9, 33, 71])
    run(store)
    after = open_store(store).manifest
    assert (after.dense, after.neurons, after.layers) == (before.dense, before.neurons, before.layers)
    with Model.open(store, context=32) as model:
        assert np.array_equal(model.logits(model.session(), [5, 9, 33, 71]), expected)


def test_refusals(store: Path) -> None:
    with pytest.raises(PredictorError, match="there is no predictor to make"):
        run(store, replace(OPTIONS, make=("low-rank",)))
    (store.parent / "short.txt").write_text(words(10))
    with pytest.raises(TextError, match="calibration takes 80 at least"):
        run(store, text="short.txt")
    with pytest.raises(CapTooSmallError, match="for looking on while this model runs"):
        run(store, cap=Cap(memory=1000))
