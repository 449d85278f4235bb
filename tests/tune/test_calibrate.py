"""Calibrating tiny models: what is committed is true, exact output stays what it was, and nothing else is possible."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from flashinfer.backend import has_native
from flashinfer.cli import main
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.errors import PredictorError, StoreBusyError, StoreError, TextError
from flashinfer.model.observe import Seen
from flashinfer.store import Level, Store, StoreUpdate, open_store, verify
from flashinfer.tune.calibrate import LEAST_TOKENS, REFINED, Report, _Judging, choose
from flashinfer.tune.options import Options
from flashinfer.tune.perplexity import Protocol, perplexity
from flashinfer.tune.statistics import LayerCounter, hottest
from flashinfer.tune.trial import untried
from flashinfer.tune.work import NAME
from tests.checkpoints import make_llama, make_opt
from tests.tune.calibrating import CONTEXT, OPTIONS, QUICK, calibrated, contents, copy_of, make_store, token_ids, words
from tests.tune.test_statistics import naive_new, naive_union

SPARSE = ["relu", "opt"]
KINDS = [*SPARSE, "silu"]
BOS = {"relu": 1, "opt": 2, "silu": 1}
PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 300, 21)]
DECODED = [int(t) for t in np.random.default_rng(6).integers(3, 300, 6)]
Floats = npt.NDArray[np.float32]
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


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Each step ends with a collection of garbage, which need not look at what the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(400))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each kind. Read only: who calibrates takes a copy."""
    return {kind: make_store(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def made(packed: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Each kind, calibrated. Read only."""
    out = {}
    for kind in KINDS:
        path = copy_of(packed[kind], tmp_path_factory.mktemp(kind) / "store")
        report = calibrated(path, text, OPTIONS)
        out[kind] = Made(packed[kind], open_store(path), report, text, BOS[kind])
    return out


def logits(store: Path | Store, predictor: str = "exact") -> list[Floats]:
    """Of a prompt and of some tokens after it."""
    with Model.open(store, context=64, run=RunConfig(predictor=predictor)) as model:
        session = model.session()
        return [model.logits(session, PROMPT), *(model.step(session, [t]) for t in DECODED)]


def assert_same(found: list[Floats], expected: list[Floats]) -> None:
    """Bit for bit on the native backend; torch sums tile by tile, and tiles of a larger set hold other neurons."""
    for a, b in zip(found, expected, strict=True):
        if has_native():
            assert np.array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


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


class TestOptions:
    def test_no_order(self, packed: dict[str, Path], made: dict[str, Made], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["relu"], tmp_path / "store")
        calibrated(path, text, replace(QUICK, order=False))
        assert all((n.decision, n.permutation) == ("bundled", None) for n in open_store(path).manifest.layers)
        assert_same(logits(path), logits(packed["relu"]))
        moved = copy_of(made["relu"].store.root, tmp_path / "moved")
        before = open_store(moved)
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

    def test_a_bundled_gated_model(self, made: dict[str, Made], text: Path, tmp_path: Path) -> None:
        """Thresholds are tested on all decision products: the matrix must be apart, whatever the records are."""
        records = made["silu"].store.manifest.layers[0].bundles_per_record
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
        from flashinfer import pack

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
        from flashinfer import pack

        pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
        with pytest.raises(StoreError, match="the store has no tokenizer"):
            calibrated(tmp_path / "store", text)


class TestRefining:
    """Thresholds between the levels, for the perplexity that is allowed."""

    def refined(self, targets: tuple[float, ...], cost: Any, allowed: float = 0.01) -> tuple[list[Level], list[Level]]:
        """Levels of these densities, and those found between them; `cost` is of a sparsity."""

        def judged(level: Level) -> Level:
            return msgspec.structs.replace(
                level, density=level.target, exact_perplexity=10.0, perplexity=10.0 * (1.0 + cost(1.0 - level.target))
            )

        def level_at(density: float) -> Level:
            return untried("threshold", density, (1.0, 1.0), 1.0, density)

        judging: Any = object.__new__(_Judging)
        judging._exact, judging.level = 10.0, judged
        judging._job = SimpleNamespace(options=Options(max_ppl_increase=allowed))
        levels = [judged(level_at(t)) for t in targets]
        found = judging.refined(levels, SimpleNamespace(level_at=level_at))
        return levels, found

    @pytest.mark.parametrize("power", [2, 3, 4])
    @pytest.mark.parametrize("allowed", [0.003, 0.01, 0.1])
    def test_it_comes_close_to_what_is_allowed(self, power: int, allowed: float) -> None:
        levels, found = self.refined((0.7, 0.6, 0.5, 0.4, 0.3), lambda s: 0.5 * s**power, allowed)
        true = 1.0 - (allowed / 0.5) ** (1 / power)
        every = [*levels, *found]
        chosen = every[choose(every, Options(max_ppl_increase=allowed))]
        assert chosen.perplexity <= 10.0 * (1 + allowed)
        assert chosen.target == pytest.approx(max(true, 0.3), abs=0.03)
        assert len(found) <= REFINED + 1
        assert len({level.target for level in every}) == len(every)

    def test_nothing_is_left_to_find(self) -> None:
        assert self.refined((0.7, 0.3), lambda s: 0.001)[1] == []
        assert self.refined((0.7, 0.3), lambda s: 1.0 * s, allowed=0.0)[1] == []

    def test_where_nothing_may_be_left_out(self) -> None:
        """Then the least harm is done."""
        levels, found = self.refined((0.7, 0.3), lambda s: s)
        assert [level.target for level in found] == [0.98]
        assert choose([*levels, *found], Options()) == 2

    @pytest.mark.parametrize("targets", [(0.99, 0.97), (0.999, 0.5), (0.9995, 0.9)])
    def test_no_level_twice(self, targets: tuple[float, ...]) -> None:
        levels, found = self.refined(targets, lambda s: 0.0 if s < 0.0012 else 0.02)
        every = [level.target for level in (*levels, *found)]
        assert len(set(every)) == len(every)
        assert all(targets[1] <= t <= 1.0 for t in every)


class TestChoosing:
    def levels(self, predictor: str, *rows: tuple[float, float, float]) -> list[Level]:
        return [Level(predictor, t, (1.0,), 0.9, d, p, 10.0) for t, d, p in rows]  # type: ignore[arg-type]

    def test_low_rank_by_recall(self) -> None:
        levels = self.levels("low-rank", (0.9, 0.2, 11.0), (0.95, 0.3, 10.5), (0.99, 0.5, 10.0))
        assert choose(levels, Options(recall=0.95)) == 1
        assert choose(levels, Options(recall=0.9, density=0.5)) == 0

    def test_thresholds_by_density_or_by_perplexity(self) -> None:
        levels = self.levels("threshold", (0.7, 0.7, 10.05), (0.5, 0.5, 10.09), (0.3, 0.3, 12.0))
        assert choose(levels, Options()) == 1
        assert choose(levels, Options(max_ppl_increase=0.3)) == 2
        assert choose(levels, Options(max_ppl_increase=0.001)) == 0
        assert choose(levels, Options(density=0.3)) == 2
