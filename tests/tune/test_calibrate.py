"""Calibrating tiny models: what is committed is true, exact output stays what it was, and nothing else is possible."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from flashinfer.cli import main
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.errors import StoreError
from flashinfer.model.observe import Seen
from flashinfer.store import Store, StoreUpdate, open_store, verify
from flashinfer.tune.calibrate import Report
from flashinfer.tune.perplexity import Protocol, perplexity
from flashinfer.tune.statistics import LayerCounter, hottest
from flashinfer.tune.work import NAME
from tests.tune.calibrating import (
    CONTEXT,
    KINDS,
    OPTIONS,
    assert_same,
    calibrated,
    contents,
    copy_of,
    logits,
    token_ids,
    words,
)
from tests.tune.test_statistics import naive_new, naive_union

pytestmark = pytest.mark.usefixtures("quick_collections")

SPARSE = ["relu", "opt"]
BOS = {"relu": 1, "opt": 2, "silu": 1}
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Made:
    """A model as it was packed, its calibrated copy, and what calibrating said."""

    packed: Path
    store: Store
    report: Report
    text: Path
    bos: int

    @property
    def held_out(self) -> list[int]:
        """The tokens levels were judged by."""
        ids = token_ids(self.packed, self.text)[: OPTIONS.tokens + OPTIONS.held_out]
        assert len(ids) == OPTIONS.tokens + OPTIONS.held_out
        return ids[-OPTIONS.held_out :]


@pytest.fixture(scope="module")
def made(packed: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Each kind, calibrated. Read only."""
    out = {}
    for kind in KINDS:
        path = copy_of(packed[kind], tmp_path_factory.mktemp(kind) / "store")
        report = calibrated(path, text, OPTIONS)
        out[kind] = Made(packed[kind], open_store(path), report, text, BOS[kind])
    return out


class TestTheStore:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_whole_and_holds_what_was_reported(self, made: dict[str, Made], kind: str) -> None:
        m = made[kind]
        assert verify(m.store) == []
        assert not (m.store.root / NAME).exists()
        named = {entry.name for entry in m.store.manifest.files()}
        assert {p.name for p in m.store.root.iterdir()} == {*named, "manifest.json", "lock"}
        found = m.store.calibration()
        assert found is not None
        assert msgspec.structs.replace(found, weights="") == m.report.calibration
        assert (found.tokens, found.held_out) == (OPTIONS.tokens, OPTIONS.held_out)
        assert not m.report.resumed

    @pytest.mark.parametrize("kind", SPARSE)
    def test_decisions_are_in_the_bundles_and_neurons_have_moved(self, made: dict[str, Made], kind: str) -> None:
        m = made[kind].store.manifest
        assert all(layer.decision == "bundled" for layer in m.layers)
        assert any(layer.permutation is not None for layer in m.layers)
        assert f"layers.0.ffn.{m.facts.decision}.weight" not in m.tensors
        assert "layers.1.ffn.sketch.bias" in m.tensors

    def test_a_gated_model_keeps_its_decisions_apart(self, made: dict[str, Made]) -> None:
        m = made["silu"].store.manifest
        assert all(layer.decision == "separate" for layer in m.layers)
        assert [role for role, t in m.tensors.items() if t.file == "predictors"] == [
            f"layers.{i}.ffn.threshold" for i in range(2)
        ]

    @pytest.mark.parametrize("kind", SPARSE)
    def test_factors_take_no_more_than_their_share(self, made: dict[str, Made], kind: str) -> None:
        m = made[kind].store.manifest
        factors = {role: t for role, t in m.tensors.items() if ".lowrank." in role}
        assert len(factors) == 3 * 2
        assert 0 < sum(t.bytes for t in factors.values()) <= OPTIONS.share * m.weight_bytes()

    @pytest.mark.parametrize("kind", KINDS)
    def test_exact_output_is_what_it_was(self, made: dict[str, Made], kind: str) -> None:
        before = logits(made[kind].packed)
        assert_same(logits(made[kind].store), before)
        if kind in SPARSE:
            assert_same(logits(made[kind].store, "certified"), before)
            with Model.open(made[kind].store) as model:
                assert model.choice.kind == "certified"

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_level_opens_and_runs(self, made: dict[str, Made], kind: str) -> None:
        exact, seen = logits(made[kind].packed), []
        for level in made[kind].report.calibration.levels:
            found = logits(made[kind].store, f"{level.predictor}:{level.target:g}")
            assert all(np.isfinite(x).all() for x in found)
            seen.append(max(float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True)))
        assert len(seen) >= 2
        assert min(seen) > 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_plan_goes_by_what_was_measured(self, made: dict[str, Made], kind: str, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("flashinfer.bench.rates.BUFFER", 1 << 20)
        predictor = "certified" if kind in SPARSE else "threshold"
        arguments = [
            "--weight-memory", "2MB", "--context", "32", "--seconds", "0.001", "--json", "--predictor", predictor,
        ]  # fmt: skip
        assert main(["plan", str(made[kind].store.root), *arguments]) == 0
        firing = json.loads(capsys.readouterr().out)["prediction"]["firing"]
        assert firing["source"] == "measured"
        known = made[kind].report.calibration.statistics[predictor]
        assert firing["density"] == pytest.approx(np.mean([s.density for s in known]), rel=0.03)


class TestWhatWasMeasured:
    @pytest.mark.parametrize("kind", KINDS)
    def test_perplexity_is_that_of_the_store(self, made: dict[str, Made], kind: str) -> None:
        m = made[kind]
        protocol = Protocol(CONTEXT, CONTEXT - 1, m.bos)
        found = {}
        for level in m.report.calibration.levels:
            for name in ("exact", f"{level.predictor}:{level.target:g}"):
                if name not in found:
                    with Model.open(m.store, context=CONTEXT, run=RunConfig(predictor=name)) as model:
                        found[name] = perplexity(model, np.array(m.held_out), protocol).perplexity
            assert level.exact_perplexity == pytest.approx(found["exact"], rel=1e-9)
            assert level.perplexity == pytest.approx(found[name], rel=1e-9)
        assert len(set(found.values())) == len(found) > 2

    @pytest.mark.parametrize("kind", SPARSE)
    def test_statistics_are_a_plain_count(self, made: dict[str, Made], kind: str) -> None:
        m, statistics = made[kind], made[kind].report.calibration.statistics
        fired, needed = seen_in(m, "exact")
        assert [*statistics] == ["exact", "certified", "low-rank"]
        assert_counted(m.store, statistics["exact"], fired)
        assert_counted(m.store, statistics["certified"], needed)
        assert all((n & f).sum() == f.sum() < n.sum() for f, n in zip(fired, needed, strict=True))
        assert_counted(m.store, statistics["low-rank"], seen_in(m, "low-rank")[1])

    def test_statistics_of_thresholds(self, made: dict[str, Made]) -> None:
        m, statistics = made["silu"], made["silu"].report.calibration.statistics
        assert [*statistics] == ["threshold"]
        fired, needed = seen_in(m, "threshold")
        assert_counted(m.store, statistics["threshold"], needed)
        assert all(np.array_equal(f, n) for f, n in zip(fired, needed, strict=True))

    @pytest.mark.parametrize("kind", SPARSE)
    def test_what_low_rank_levels_promise(self, made: dict[str, Made], kind: str) -> None:
        """Recall was measured on other tokens than these, and there are few: about that, and rising."""
        m = made[kind]
        fired = np.concatenate(seen_in(m, "exact")[0], axis=1)
        reached = []
        for level in m.report.calibration.levels:
            named = np.concatenate(seen_in(m, f"low-rank:{level.target:g}")[1], axis=1)
            assert level.density == pytest.approx(named.mean(), rel=1e-9)
            reached.append(float((named & fired).sum() / fired.sum()))
        targets = [level.target for level in m.report.calibration.levels]
        assert targets == [0.9, 0.98]
        assert reached == pytest.approx(targets, abs=0.1)
        assert reached[0] < reached[1]
        assert all(level.recall >= level.target for level in m.report.calibration.levels)

    def test_what_thresholds_promise(self, made: dict[str, Made]) -> None:
        levels = sorted(made["silu"].report.calibration.levels, key=lambda level: level.target)
        assert {0.4, 0.7} <= {level.target for level in levels}
        for level in levels:
            assert level.density == pytest.approx(level.target, abs=0.05)
            assert level.density < level.recall < 1.0  # those that are kept are those that add most
        assert sorted(level.recall for level in levels) == [level.recall for level in levels]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_chosen_level(self, made: dict[str, Made], kind: str) -> None:
        c = made[kind].report.calibration
        predictor = "low-rank" if kind in SPARSE else "threshold"
        [chosen] = c.chosen.items()
        assert chosen[0] == predictor
        level = c.levels[chosen[1]]
        if kind in SPARSE:
            assert level.target == OPTIONS.recall
        else:
            allowed = [n for n in c.levels if n.perplexity <= 1.01 * n.exact_perplexity]
            assert level == (
                min(allowed, key=lambda n: n.density) if allowed else min(c.levels, key=lambda n: n.perplexity)
            )
        with Model.open(made[kind].store, run=RunConfig(predictor=predictor)) as model:
            assert model.choice.level == level


def seen_in(m: Made, predictor: str) -> tuple[list[Mask], list[Mask]]:
    """By layer, who fired and who was needed for each token that is run to score the held-out text."""
    fired: list[list[Mask]] = [[], []]
    needed: list[list[Mask]] = [[], []]

    class Keep:
        def seen(self, layer: int, step: Seen) -> None:
            fired[layer].append(step.active.copy())
            needed[layer].append(step.needed.copy() if step.needed is not None else np.ones_like(step.active))

    with Model.open(m.store, context=CONTEXT, run=RunConfig(predictor=predictor)) as model:
        model.observe(Keep())
        for begin in range(0, len(m.held_out), CONTEXT - 1):
            window = [m.bos, *m.held_out[begin : begin + CONTEXT - 1]]
            model.logits(model.session(), window[:-1])
    return [np.concatenate(x) for x in fired], [np.concatenate(x) for x in needed]


def assert_counted(store: Store, found: Any, masks: list[Mask]) -> None:
    for layer, (s, mask) in enumerate(zip(found, masks, strict=True)):
        assert s.density == pytest.approx(mask.mean())
        assert s.new == pytest.approx([naive_new(mask, k) for k in range(17)])
        assert s.union == pytest.approx([naive_union(mask, 1 << i) for i in range(8)])
        assert s.hot == pytest.approx(hottest(mask.sum(axis=0)))
        counter = LayerCounter(store.geometry(layer))
        counter.add(mask)
        assert s.missing == counter.result().missing
        assert s.missing[0] > s.missing[8] > s.missing[16] == 0


class TestAgain:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_calibrated_store_becomes_the_same_store(self, made: dict[str, Made], kind: str, tmp_path: Path) -> None:
        """Bundled and permuted as it is: samples and weights are those of the original order."""
        path = copy_of(made[kind].store.root, tmp_path / "store")
        report = calibrated(path, made[kind].text, OPTIONS)
        assert not report.resumed
        assert contents(path) == contents(made[kind].store.root)

    def test_by_another_text(self, made: dict[str, Made], tmp_path: Path) -> None:
        path, other = copy_of(made["relu"].store.root, tmp_path / "store"), tmp_path / "other.txt"
        other.write_text(words(200, seed=1))
        before = open_store(path).manifest.predictors
        calibrated(path, other)
        assert verify(open_store(path)) == []
        assert open_store(path).manifest.predictors != before
        assert_same(logits(path), logits(made["relu"].packed))

    @pytest.mark.parametrize("damage", ["foreign", "cut"])
    def test_a_calibration_that_cannot_be_used_is_replaced(self, made: dict[str, Made], damage: str, tmp_path: Path):
        """`calibrate` is what its error tells people to run."""
        path = copy_of(made["relu"].store.root, tmp_path / "store")
        manifest = json.loads((path / "manifest.json").read_text())
        entry = manifest["sections"]["calibration"]
        if damage == "foreign":
            data = json.loads((path / entry["name"]).read_text()) | {"weights": "0" * 32}
            store = open_store(path)
            with StoreUpdate(store) as update, update.create("calibration", ".json") as file:
                file.write(json.dumps(data).encode())
            made_up = update.entries[-1]
            (path / made_up.name).write_bytes(json.dumps(data).encode())
            manifest["sections"]["calibration"] = msgspec.to_builtins(made_up)
            (path / "manifest.json").write_text(json.dumps(manifest))
        else:
            (path / entry["name"]).write_bytes(b"{" + b" " * (entry["bytes"] - 1))
        with pytest.raises(StoreError, match="run `flashinfer calibrate` again"):
            Model.open(path)
        calibrated(path, made["relu"].text)
        assert verify(open_store(path)) == []
        assert_same(logits(path), logits(made["relu"].packed))
