"""What calibration makes of samples: memory it says beforehand, and tensors that are read when they are written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import CapTooSmallError
from flashinfer.store import StoreUpdate, open_store
from flashinfer.tune import job as job_module
from flashinfer.tune import make
from flashinfer.tune.arrange import arrange
from flashinfer.tune.collect import sample_file
from flashinfer.tune.job import Job
from flashinfer.tune.layers import Fitted
from flashinfer.tune.options import Options
from flashinfer.tune.samples import SampleWriter
from flashinfer.tune.statistics import counter_bytes
from flashinfer.tune.work import Work
from tests.checkpoints import make_llama
from tests.tune.firings import grouped, packed


def masks_of(folder: Path, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    work = Work(folder, "key")
    with SampleWriter(sample_file(work, 0), 4, active.shape[1]) as writer:
        writer.add(np.zeros((len(active), 4), np.float32), active)
    found: Any = make._masks(SimpleNamespace(work=work), 0)  # type: ignore[arg-type]
    return found


class TestWhatOrdersAreLearntFrom:
    def test_the_first_tokens_and_the_last_ones(self, tmp_path: Path) -> None:
        active = np.random.default_rng(0).random((1000, 30)) < 0.2
        learn, judge = masks_of(tmp_path, active)
        assert np.array_equal(learn, packed(active[:750]))
        assert np.array_equal(judge, packed(active[750:]))

    def test_no_more_than_is_worth_it(self, tmp_path: Path) -> None:
        active = np.random.default_rng(0).random((6000, 30)) < 0.1
        learn, judge = masks_of(tmp_path, active)
        assert np.array_equal(learn, packed(active[: make.LEARNT]))
        assert np.array_equal(judge, packed(active[-make.JUDGED :]))

    def test_fewer_where_many_fire(self, tmp_path: Path) -> None:
        """What bisecting takes grows with the firings, not with the tokens."""
        active = np.random.default_rng(0).random((4000, 30)) < 0.9
        learn, judge = masks_of(tmp_path, active)
        assert np.array_equal(learn, packed(active[:768]))
        assert active[:512].sum() < make.FIRINGS * 30 <= active[:768].sum()
        assert len(judge) == make.JUDGED


@pytest.mark.parametrize("density", [0.02, 0.9])
def test_memory_of_ordering(density: float) -> None:
    rng, neurons = np.random.default_rng(0), 512
    tokens = min(make.LEARNT, 256 * -(-int(make.FIRINGS / density) // 256))
    active = rng.random((tokens, neurons)) < density
    learn, judge = packed(active), packed(grouped(64, neurons, 8, 0)[0])
    tracemalloc.start()
    arrange(learn, judge, 2048, neurons=neurons, conditions=make.Conditions(slot_bytes=neurons * 512, warm=16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < make.ordering_bytes(neurons) < 4 * peak


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of a tiny model, uncapped; nothing was done yet."""
    pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
    store = open_store(tmp_path / "store")
    options = Options(tokens=256).suited(store.manifest)
    return Job(
        store,
        StoreUpdate(store),
        Work(store.root, "key"),
        options,
        Cap(),
        RunConfig(),
        "cpu",
        None,
        32,
        lambda *_: None,
    )


def test_factors_are_loaded_when_they_are_written(job: Job) -> None:
    """All of them together may be a twentieth of the model."""
    rng, facts = np.random.default_rng(0), job.store.manifest.facts
    a, b, bias = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((32, facts.hidden_size), (facts.intermediate_size, 32), (facts.intermediate_size,))
    )
    tensors = list(make._factor_tensors(job, make._goal(job), Fitted(1, 32, 0.5, ())))
    assert [t.role for t in tensors] == [f"layers.1.ffn.lowrank.{p}" for p in ("a.weight", "b.weight", "b.bias")]
    assert [t.shape for t in tensors] == [a.shape, b.shape, bias.shape]
    job.work.keep("layer-1.rank-32", a=a, b=b, bias=bias)
    for tensor, values in zip(tensors, (a, b, bias), strict=True):
        whole = make.PredictorTensor.of(tensor.role, values, tensor.codec)
        assert (whole.codec, whole.shape) == (tensor.codec, tensor.shape)
        assert b"".join(tensor.chunks()) == b"".join(whole.chunks())


def test_samples_held_are_no_more_than_there_are(job: Job) -> None:
    """Memory is asked for as far as it is used."""
    assert make._goal(job).memory == (256 + 128) * (4 + 2 * 48 + 20)


class TestRoom:
    @pytest.fixture
    def steps(self, job: Job) -> dict[str, int]:
        facts = job.store.manifest.facts
        return {
            "fitting a predictor": make.fitting_bytes(48, facts.intermediate_size, 32, make._goal(job)),
            "ordering neurons": make.ordering_bytes(facts.intermediate_size),
            "rewriting the weights": make.REWRITING,
        }

    def capped(self, job: Job, memory: int, **options: Any) -> Job:
        return Job(**{**vars(job), "cap": Cap(memory=memory), **options})

    def test_each_step_is_asked_for(self, job: Job, steps: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job_module.machine, "resident_bytes", lambda: 50_000_000)
        largest = max(steps.values())
        make.check_room(self.capped(job, 50_000_000 + largest))
        with pytest.raises(CapTooSmallError, match="raise --memory") as caught:
            make.check_room(self.capped(job, 50_000_000 + largest - 1))
        assert caught.value.floor == 50_000_000 + largest
        for name, size in steps.items():
            monkeypatch.setattr(make, "REWRITING", size if name == "rewriting the weights" else 0)
            monkeypatch.setattr(make, "fitting_bytes", lambda *_, s=size, n=name: s if n.startswith("fitting") else 0)
            monkeypatch.setattr(make, "ordering_bytes", lambda *_, s=size, n=name: s if n.startswith("order") else 0)
            with pytest.raises(CapTooSmallError, match=name):
                make.check_room(self.capped(job, 50_000_000 + size - 1))

    def test_what_is_not_made_takes_nothing(self, job: Job, steps: dict[str, int], monkeypatch) -> None:
        monkeypatch.setattr(job_module.machine, "resident_bytes", lambda: 50_000_000)
        monkeypatch.setattr(make, "REWRITING", 1)
        width = job.store.manifest.facts.intermediate_size
        enough = 50_000_000 + counter_bytes(width, width)
        options = Options(make=("certified",), order=False)
        make.check_room(self.capped(job, enough, options=options))
        with pytest.raises(CapTooSmallError, match="ordering"):
            make.check_room(self.capped(job, enough, options=Options(make=("certified",))))
        with pytest.raises(CapTooSmallError, match="counting"):
            make.check_room(self.capped(job, enough - 1, options=options))

    def test_without_a_cap(self, job: Job) -> None:
        make.check_room(job)
        assert job.has_room(1 << 60)
