"""The parts of `eval`: who is judged, what waits on disk, counts, greedy continuations, the plot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.engine import Model
from flashinfer.errors import DiskFullError, PlotError, PredictorError
from flashinfer.model.observe import Seen
from flashinfer.store import Store, open_store
from flashinfer.tune import agreement, plot, scratch
from flashinfer.tune.agreement import Counter, Inputs, Named
from flashinfer.tune.candidates import Candidates, candidates
from flashinfer.tune.divergence import Distributions, Divergence
from flashinfer.tune.greedy import Prompts, common_prefixes, continue_all, prompts_of
from flashinfer.tune.perplexity import Protocol, normalise
from tests.checkpoints import make_llama
from tests.tune.predictor_stores import WHOLE, lowrank_store

IDS = np.random.default_rng(5).integers(3, 96, 150)
PROTOCOL = Protocol(60, 59, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval-parts")
    make_llama(path / "llama")
    return path


@pytest.fixture(scope="module")
def plain(root: Path) -> Store:
    pack(root / "llama", root / "plain")
    return open_store(root / "plain")


@pytest.fixture(scope="module")
def perfect(root: Path) -> Store:
    return open_store(lowrank_store(root / "llama", root / "perfect", WHOLE, [0.0, 0.1, 0.2]))


class TestCandidates:
    def choose(self, store: Store, *asked: str, against: str | None = None, sweep: bool = False) -> Candidates:
        return candidates(
            store.manifest, store.calibration(), asked, against=against, sweep=sweep, max_ppl_increase=0.01
        )

    def test_exact_where_nobody_says(self, plain: Store) -> None:
        assert self.choose(plain) == Candidates(None, ("exact",))
        assert self.choose(plain, "all") == Candidates(None, ("all",))
        assert self.choose(plain, "all", "exact", against="exact") == Candidates("exact", ("all",))

    def test_approximations_are_held_against_exact(self, perfect: Store) -> None:
        assert self.choose(perfect, "low-rank") == Candidates("exact", ("low-rank",))
        assert self.choose(perfect, "auto", "exact") == Candidates("exact", ("auto",))
        assert self.choose(perfect, "low-rank", against="all") == Candidates("all", ("low-rank",))

    def test_a_sweep_adds_each_level_once(self, perfect: Store) -> None:
        levels = ("low-rank:0.9", "low-rank:0.91", "low-rank:0.92")
        assert self.choose(perfect, sweep=True) == Candidates("exact", levels)
        assert self.choose(perfect, "low-rank", "low-rank:0.9", sweep=True).others == ("low-rank", *levels[1:])

    def test_what_the_store_does_not_have(self, plain: Store, perfect: Store) -> None:
        for names in (["low-rank"], ["threshold:0.3"], ["certified"]):
            with pytest.raises(PredictorError, match="flashinfer calibrate"):
                self.choose(plain, *names)
        with pytest.raises(PredictorError, match=r"low-rank:0\.9,"):
            self.choose(perfect, "low-rank:0.5")
        with pytest.raises(PredictorError, match="no calibrated levels"):
            self.choose(plain, sweep=True)
        with pytest.raises(ValueError, match="not 'low-rank'"):
            self.choose(perfect, "exact", against="low-rank")


class TestFiles:
    def test_distributions_come_back_and_their_file_has_no_name(self, plain: Store) -> None:
        logs = np.random.default_rng(0).normal(size=(30, 96)).astype(np.float32)
        normalise(logs)
        before = {folder: set(folder.iterdir()) for folder in scratch.folders_for(plain)}
        with Distributions(plain, 30) as kept:
            kept.append(logs[:11], IDS[:11])
            kept.append(logs[11:], IDS[11:30])
            assert np.array_equal(kept.rows(5, 20), logs[5:25])
            assert {folder: set(folder.iterdir()) for folder in before} == before
            same, other = Divergence(kept), Divergence(kept)
            same.add(logs[:20], IDS[:20])
            same.add(logs[20:], IDS[20:30])
            other.add(np.roll(logs, 1, axis=0), IDS[:30])
        assert (same.kl, same.agreement) == (0.0, 1.0)
        p, q = logs.astype(np.float64), np.roll(logs, 1, axis=0)
        assert other.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-5)

    def test_what_is_no_number_is_not_hidden(self, plain: Store) -> None:
        with Distributions(plain, 1) as kept:
            kept.append(np.full((1, 96), np.nan, dtype=np.float32), IDS[:1])
            found = Divergence(kept)
            found.add(np.zeros((1, 96), dtype=np.float32), IDS[:1])
        assert np.isnan(found.kl)

    def test_no_room(self, plain: Store) -> None:
        with pytest.raises(DiskFullError, match="fewer --tokens"):
            Distributions(plain, 10**15)

    def test_a_folder_that_takes_no_file(self, plain: Store, tmp_path: Path) -> None:
        missing = Store(tmp_path / "nowhere" / "store", plain.manifest)
        with Distributions(missing, 1) as kept:
            kept.append(np.zeros((1, 96), dtype=np.float32), IDS[:1])
            assert not kept.rows(0, 1).any()

    def test_some_inputs_are_kept_evenly(self, plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement, "SAMPLED", 10)
        facts, rng = plain.manifest.facts, np.random.default_rng(3)
        x = rng.normal(size=(47, facts.hidden_size)).astype(np.float32)
        fired = rng.random((47, facts.intermediate_size)) < 0.1
        with Inputs(plain, 47) as inputs:
            for cut in (slice(0, 3), slice(3, 4), slice(4, 30), slice(30, 47)):
                for layer in range(facts.num_layers):
                    inputs.seen(layer, Seen(x[cut] + layer, x[cut], fired[cut], None))
            for layer in range(facts.num_layers):
                blocks = list(inputs.layer(layer, 4))
                assert [len(b) for b, _ in blocks] == [4, 4, 2]
                kept = [int(np.flatnonzero((x + layer == row).all(axis=1))[0]) for b, _ in blocks for row in b]
                assert set(np.diff([-1, *kept])) <= {4, 5}
                assert np.array_equal(np.concatenate([f for _, f in blocks]), fired[kept])


def test_counts_of_who_is_named(plain: Store) -> None:
    counter, neurons = Counter(plain.manifest.facts, complete=True), plain.manifest.facts.intermediate_size
    active = np.zeros((4, neurons), dtype=bool)
    active[:, :8] = True
    needed = np.zeros((4, neurons), dtype=bool)
    needed[:, :10] = True
    counter.seen(0, Seen(np.zeros((4, 48), np.float32), np.zeros((4, neurons), np.float32), active, needed))
    counter.seen(1, Seen(np.zeros((4, 48), np.float32), np.zeros((4, neurons), np.float32), active, None))
    counter.seen(
        2, Seen(np.zeros((4, 48), np.float32), np.zeros((4, neurons), np.float32), active & False, needed & False)
    )
    assert counter.layers() == (Named(10 / neurons, 1.0, 0.8), Named(1.0, 1.0, 8 / neurons), Named(0.0, 1.0, 1.0))


class TestGreedy:
    def test_prompts_fit_the_context(self) -> None:
        prompts = prompts_of(IDS, PROTOCOL, 12)
        assert [len(p) for p in prompts.ids] == [33] * 4
        assert all(p[0] == 1 for p in prompts.ids)
        assert prompts.ids[0][1:] == tuple(IDS[:32])
        assert prompts.ids[-1][1:] == tuple(IDS[-32:])
        tight = prompts_of(IDS[:20], Protocol(10, 10, None), 100)
        assert (tight.tokens, {len(p) for p in tight.ids}) == (5, {5})
        assert prompts_of(IDS, PROTOCOL, 0) == Prompts((), 0)
        assert len(prompts_of(IDS[:32], PROTOCOL, 12).ids) == 1

    def test_the_first_difference_ends_it(self, plain: Store) -> None:
        prompts = prompts_of(IDS, PROTOCOL, 6)
        with Model.open(plain, context=60) as model:
            said = continue_all(model, prompts)
            assert [len(s) for s in said] == [6] * 4
            assert common_prefixes(model, prompts, said) == (6,) * 4
            for n, script in enumerate(said):
                script[n] = (script[n] + 1) % 96
            assert common_prefixes(model, prompts, said) == (0, 1, 2, 3)


class TestPlot:
    POINTS = (plot.Point("exact", "exact", 3e6, 0.0), plot.Point("low-rank", "low-rank:0.98", 1.5e6, 0.2))

    @pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF"])
    def test_it_is_written(self, tmp_path: Path, name: str) -> None:
        pytest.importorskip("matplotlib")
        plot.check_plot(tmp_path / name)
        plot.draw(tmp_path / name, self.POINTS, "a model")
        assert (tmp_path / name).stat().st_size > 1000

    def test_where_it_cannot_be(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        for name, why in (("a.xyz", r"\.png"), ("none/a.png", "is no directory")):
            with pytest.raises(PlotError, match=why):
                plot.check_plot(tmp_path / name)
        (tmp_path / "a.png").mkdir()
        with pytest.raises(PlotError, match="Is a directory"):
            plot.draw(tmp_path / "a.png", self.POINTS, "a model")

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(PlotError, match=r"pip install 'flashinfer-offload\[plot\]'"):
            plot.check_plot(tmp_path / "a.png")
