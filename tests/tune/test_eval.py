"""What `eval` says of predictors: held against predictors whose quality is known beforehand, and brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.choice import Choice
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapExceededError, CapTooSmallError
from flashinfer.model.observe import Seen
from flashinfer.store import Store, open_store
from flashinfer.tune import judge
from flashinfer.tune.agreement import Named
from flashinfer.tune.candidates import Candidates
from flashinfer.tune.evaluate import evaluate
from flashinfer.tune.greedy import prompts_of
from flashinfer.tune.judge import Quality, Setup
from flashinfer.tune.perplexity import Protocol
from tests.checkpoints import make_llama, make_opt
from tests.tune.predictor_stores import WHOLE, lowrank_store, threshold_store
from tests.twin import role_tensors

IDS = np.random.default_rng(5).integers(3, 96, 150)
PROTOCOL = Protocol(60, 59, 1)
HARMFUL = -0.4
"""A shift so low that many of those that fire are not named."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    return make_llama(root / "llama", mlp_bias=True)


@pytest.fixture(scope="module")
def plain(root: Path, llama: Path) -> Store:
    pack(llama, root / "plain")
    return open_store(root / "plain")


@pytest.fixture(scope="module")
def perfect(root: Path, llama: Path) -> Store:
    return open_store(lowrank_store(llama, root / "perfect", WHOLE, [1e-3, 1e9, HARMFUL]))


@pytest.fixture(scope="module")
def coarse(root: Path, llama: Path) -> Store:
    return open_store(lowrank_store(llama, root / "coarse", 32, [0.0, 0.5]))


def setup(greedy: int = 12, **options) -> Setup:
    return Setup(PROTOCOL, prompts_of(IDS, PROTOCOL, greedy), options.pop("cap", Cap()), RunConfig(), **options)


def judged(store: Store, *names: str, against: str | None = "exact") -> list[Quality]:
    return evaluate(store, IDS, Candidates(against, names), setup(), lambda *_: None)


def truth(store: Store) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By layer the FFN inputs of all windows, and who fires."""
    inputs: list[list[np.ndarray]] = [[] for _ in store.manifest.layers]
    fired: list[list[np.ndarray]] = [[] for _ in store.manifest.layers]

    class Keep:
        def seen(self, layer: int, step: Seen) -> None:
            inputs[layer].append(step.x.copy())
            fired[layer].append(step.active.copy())

    with Model.open(store, context=PROTOCOL.context) as model:
        model.observe(Keep())
        for w in PROTOCOL.windows(len(IDS)):
            model.logits(model.session(), [1, *IDS[w.begin : w.end - 1].tolist()])
    return [np.concatenate(x) for x in inputs], [np.concatenate(x) for x in fired]


class TestAgainstExact:
    def test_what_is_exact_differs_in_nothing(self, perfect: Store) -> None:
        exact, again, everyone = judged(perfect, "certified", "all")
        assert (exact.kl, exact.agreement, exact.prefixes) == (None, None, ())
        assert exact.choice == again.choice == Choice("certified")
        assert again.score == exact.score
        assert (again.kl, again.agreement, again.prefixes) == (0.0, 1.0, (12,) * 4)
        assert everyone.score.perplexity == pytest.approx(exact.score.perplexity, rel=1e-5)
        assert everyone.kl == pytest.approx(0.0, abs=1e-6)
        assert all(n.density == n.recall == 1.0 for n in everyone.named)
        assert all(n.recall == 1.0 and 0 < n.precision <= 1 for n in again.named)
        for few, every in zip(again.named, everyone.named, strict=True):
            assert few.density * few.precision == pytest.approx(every.precision, rel=1e-9)  # both: the share that fires

    def test_factors_that_are_the_whole_matrix(self, perfect: Store) -> None:
        exact, first, everyone, few = judged(perfect, "low-rank", "low-rank:0.91", "low-rank:0.92")
        assert [q.name for q in (first, everyone, few)] == ["low-rank:0.9", "low-rank:0.91", "low-rank:0.92"]
        assert first.score.perplexity == pytest.approx(exact.score.perplexity, rel=1e-6)
        assert (first.agreement, first.prefixes) == (1.0, (12,) * 4)
        assert all(n.recall == 1.0 and n.precision > 0.98 for n in first.named)
        assert all(n.recall == n.density == 1.0 for n in everyone.named)
        assert few.kl is not None
        assert few.agreement is not None
        assert few.kl > 1e-4
        assert few.agreement < 1.0
        assert min(few.prefixes) < 12
        assert all(n.recall is not None and n.recall < 0.9 and n.precision == 1.0 for n in few.named)

    def test_recall_and_precision_by_brute_force(self, coarse: Store) -> None:
        found = judged(coarse, "low-rank:0.9", "low-rank:0.91")[1:]
        inputs, fired = truth(coarse)
        for layer, (x, true) in enumerate(zip(inputs, fired, strict=True)):
            a, b, bias = (
                coarse.read_tensor(f"layers.{layer}.ffn.lowrank.{p}") for p in ("a.weight", "b.weight", "b.bias")
            )
            scores = x @ a.T @ b.T + bias
            for quality, shift in zip(found, (0.0, 0.5), strict=True):
                named = scores > -shift
                want = Named(named.mean(), (named & true).sum() / true.sum(), (named & true).sum() / named.sum())
                for part in ("density", "recall", "precision"):
                    assert getattr(quality.named[layer], part) == pytest.approx(getattr(want, part), abs=2e-3)
        assert all(q.named[0].recall < 1.0 for q in found)

    def test_divergence_by_brute_force(self, coarse: Store) -> None:
        exact, few = judged(coarse, "low-rank")
        rows = {}
        for name in ("exact", "low-rank"):
            with Model.open(coarse, context=60, run=RunConfig(predictor=name)) as model:
                logits = [
                    model.logits(model.session(), [1, *IDS[w.begin : w.end - 1].tolist()])
                    for w in PROTOCOL.windows(len(IDS))
                ]
            rows[name] = np.concatenate(logits).astype(np.float64)
            rows[name] -= np.log(np.exp(rows[name]).sum(axis=1, keepdims=True))
        p, q = rows["exact"], rows["low-rank"]
        at = np.arange(len(IDS))
        assert exact.score.nll == pytest.approx(-p[at, IDS].sum(), rel=1e-5)
        assert few.score.nll == pytest.approx(-q[at, IDS].sum(), rel=1e-5)
        assert few.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3)
        assert few.agreement == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())

    def test_on_torch_it_is_the_same(self, perfect: Store) -> None:
        run = RunConfig(backend="torch")
        said = [
            evaluate(perfect, IDS, Candidates("exact", ("all", "low-rank")), replace(setup(), run=r), lambda *_: None)
            for r in (run, RunConfig())
        ]
        for other, usual in zip(*said, strict=True):
            assert other.score.nll == pytest.approx(usual.score.nll, rel=1e-6)
            assert other.kl == pytest.approx(usual.kl, abs=1e-6)
            assert other.prefixes == usual.prefixes
            for ours, theirs in zip(other.named, usual.named, strict=True):
                assert ours.recall == theirs.recall == 1.0
                assert ours.density == pytest.approx(theirs.density, abs=1e-4)

    def test_progress_reaches_the_end(self, perfect: Store) -> None:
        told: dict[str, list[tuple[int, int]]] = {}
        who = Candidates("exact", ("low-rank",))
        evaluate(perfect, IDS, who, setup(), lambda name, *now: told.setdefault(name, []).append(now))
        total = len(IDS) + 4 * 12
        for name in who.names:
            assert told[name] == sorted(told[name])
            assert told[name][-1] == (total, total)
            assert len(told[name]) > 6

    def test_alone_nothing_is_compared(self, plain: Store) -> None:
        [quality] = judged(plain, "exact", against=None)
        assert (quality.kl, quality.agreement, quality.prefixes, quality.name) == (None, None, (), "exact")
        assert all(n.recall == n.precision == 1.0 and 0 < n.density < 1 for n in quality.named)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_thresholds_by_brute_force(root: Path, family: str) -> None:
    if family == "llama":
        checkpoint = make_llama(root / "silu", hidden_act="silu", mlp_bias=True)
    else:
        checkpoint = make_opt(root / "gelu", activation_function="gelu")
    store = open_store(threshold_store(checkpoint, root / f"{family}-thresholds", 0.1, [0.0, 1.0, 3.0]))
    exact, *levels = judged(store, "threshold:0.9", "threshold:0.91", "threshold:0.92")
    assert all(n == Named(1.0, 1.0, 1.0) for n in exact.named)
    weights = {name: tensor.float().numpy() for name, tensor in role_tensors(checkpoint).items()}
    for layer, (x, _) in enumerate(zip(*truth(store), strict=True)):

        def product(name: str, x: np.ndarray = x, layer: int = layer) -> torch.Tensor:
            at = f"layers.{layer}.ffn.{name}"
            return torch.from_numpy(x @ weights[f"{at}.weight"].T + weights[f"{at}.bias"])

        if family == "llama":
            act, up = torch.nn.functional.silu(product("gate")).numpy(), product("up").numpy()
        else:
            act, up = torch.nn.functional.gelu(product("up")).numpy(), 1.0
        size = np.abs(act * up) * np.linalg.norm(weights[f"layers.{layer}.ffn.down.weight"], axis=0)
        for quality, factor in zip(levels, (0.0, 1.0, 3.0), strict=True):
            kept = np.abs(act) > 0.1 * factor
            assert quality.named[layer].recall == pytest.approx(size[kept].sum() / size.sum(), abs=0.01)
            assert quality.named[layer].density == pytest.approx(kept.mean(), abs=0.05)  # on its own inputs
            assert quality.named[layer].precision == 1.0
    assert levels[0].kl < levels[1].kl < levels[2].kl
    assert levels[2].named[0].recall < 0.95


class TestCaps:
    def test_the_cap_is_kept_beside_what_scoring_takes(self, plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[int] = []
        whole = Model.open

        def watched(store, cap, **options):
            opened.append(cap.memory)
            return whole(store, cap, **options)

        monkeypatch.setattr(judge.Model, "open", watched)
        cap = judge.machine.resident_bytes() + 100_000_000
        monkeypatch.setattr(judge.machine, "peak_resident_bytes", lambda: cap)
        evaluate(plain, IDS, Candidates(None, ("exact",)), setup(cap=Cap(memory=cap), aside=1_000_000), lambda *_: None)
        assert opened == [cap - 1_000_000 - judge.reserve(plain.manifest.facts, 128)]
        monkeypatch.setattr(judge.machine, "peak_resident_bytes", lambda: cap + 1)
        with pytest.raises(CapExceededError):
            evaluate(plain, IDS, Candidates(None, ("exact",)), setup(cap=Cap(memory=cap)), lambda *_: None)

    def test_chunks_shrink_before_a_cap_is_refused(self, plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        chunks: list[int] = []
        whole = judge.settle

        def watched(*given, run, **options):
            chunks.append(run.prefill_chunk)
            return whole(*given, run=run, **options)

        monkeypatch.setattr(judge, "settle", watched)
        monkeypatch.setattr(judge.machine, "peak_resident_bytes", lambda: 0)
        monkeypatch.setattr("flashinfer.machine.resident_bytes", lambda: 50_000_000)
        who = Candidates(None, ("exact",))
        with pytest.raises(CapTooSmallError, match="for scoring a text") as caught:
            evaluate(plain, IDS, who, setup(cap=Cap(memory=1_000_000)), lambda *_: pytest.fail("it began"))
        assert chunks == [128, 64, 32, 16]
        chunks.clear()
        floor = caught.value.floor
        small = evaluate(plain, IDS, who, setup(cap=Cap(memory=floor)), lambda *_: None)
        assert chunks == [128, 64, 32, 16]
        with pytest.raises(CapTooSmallError):
            evaluate(plain, IDS, who, setup(cap=Cap(memory=floor - 1)), lambda *_: None)
        large = evaluate(plain, IDS, who, setup(), lambda *_: None)
        assert small[0].score.nll == pytest.approx(large[0].score.nll, rel=1e-6)

    def test_weights_alone_are_capped_as_they_are(self, plain: Store) -> None:
        with pytest.raises(CapTooSmallError, match="weight-memory cap"):
            evaluate(plain, IDS, Candidates(None, ("exact",)), setup(cap=Cap(weight_memory=1000)), lambda *_: None)
