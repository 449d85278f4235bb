"""Samples of a text: every token of every window, in parts or at once, whoever was stopped meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer import machine
from flashinfer.backend import has_native
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.model.observe import Seen
from flashinfer.store import Store, open_store
from flashinfer.tune import collect as module
from flashinfer.tune.collect import collect, fit_span, observing_bytes, sample_bytes, sample_file
from flashinfer.tune.samples import Samples, pack_samples, unpack_samples
from flashinfer.tune.work import Work
from tests.tune.calibrating import make_store

IDS = np.random.default_rng(3).integers(3, 300, 120)
CONTEXT = 24
LAYERS = 2
Found = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(make_store(tmp_path_factory.mktemp("collect"), "relu"))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows are a part; three samples are copied at once."""
    monkeypatch.setattr(module, "PART", 2 * CONTEXT)
    monkeypatch.setattr(module, "COPIED", 3)


def collected(store: Store, folder: Path, bos: int | None = 1, **options: Any) -> Found:
    """By layer, all samples there are in the end."""
    folder.mkdir(exist_ok=True)
    work = Work(folder, "key")
    collect(store, IDS, work, context=CONTEXT, bos=bos, **({"cap": Cap(), "run": RunConfig()} | options))
    return samples(work)


def samples(work: Work) -> Found:
    found = []
    for layer in range(LAYERS):
        with Samples(sample_file(work, layer)) as file:
            block = file.read(0, file.count)
            found.append((block.x, block.active))
    return found


def truth(store: Store, bos: int | None) -> Found:
    """The same by hand: windows that begin anew, one session each."""
    seen: list[list[Seen]] = [[] for _ in range(LAYERS)]

    class Keep:
        def seen(self, layer: int, step: Seen) -> None:
            seen[layer].append(Seen(step.x.copy(), step.gate.copy(), step.active.copy(), None))

    room = CONTEXT if bos is None else CONTEXT - 1
    with Model.open(store, context=CONTEXT) as model:
        model.observe(Keep())
        for begin in range(0, len(IDS), room):
            window = IDS[begin : begin + room].tolist()
            model.step(model.session(), window if bos is None else [bos, *window])
    return [(np.concatenate([s.x for s in steps]), np.concatenate([s.active for s in steps])) for steps in seen]


def same(a: Found, b: Found) -> bool:
    pairs = zip(a, b, strict=True)
    return all(np.array_equal(x, y) for one, two in pairs for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("bos", [None, 1])
def test_every_token_of_every_window(store: Store, tmp_path: Path, bos: int | None) -> None:
    found, true = collected(store, tmp_path, bos), truth(store, bos)
    windows = -(-len(IDS) // (CONTEXT - (bos is not None)))
    for (x, active), (inputs, fired) in zip(found, true, strict=True):
        assert len(x) == len(IDS) + (windows if bos is not None else 0)
        assert np.array_equal(active, fired)
        assert np.array_equal(x, unpack_samples(pack_samples(inputs, fired), fired.shape[1]).x)
        assert 0.1 < active.mean() < 0.9


def test_in_parts_or_at_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = collected(store, tmp_path / "parts")
    monkeypatch.setattr(module, "PART", 10**6)
    assert same(parts, collected(store, tmp_path / "once"))
    assert {p.name for p in (tmp_path / "parts" / ".calibrate").iterdir()} == {
        "state.json", "layer-0.samples", "layer-1.samples",
    }  # fmt: skip


def test_progress_and_parts_after_an_interruption(store: Store, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:  # in the second part
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(store, tmp_path, progress=stop)
    assert [p.name for p in (tmp_path / ".calibrate").glob("*.samples")] == []
    again: list[tuple[int, int]] = []
    found = collected(store, tmp_path, progress=lambda *now: again.append(now))
    assert same(found, collected(store, tmp_path / "whole"))
    assert told[:2] == [(24, 126), (48, 126)]
    assert again[0] == (72, 126)  # the first part was not run again
    assert again[-1] == (126, 126)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_stopped_while_parts_are_joined(store: Store, tmp_path: Path, layer: int, monkeypatch) -> None:
    """Before or after the first layer is whole."""
    writer, made = module.SampleWriter, []

    class Stops(writer):
        def add(self, x, active) -> None:
            if self.path.name == f"layer-{layer}.samples" and len(made) > 4:
                raise KeyboardInterrupt
            made.append(self.path.name)
            super().add(x, active)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SampleWriter", Stops)
        with pytest.raises(KeyboardInterrupt):
            collected(store, tmp_path)
    told: list[int] = []
    found = collected(store, tmp_path, progress=lambda done, total: told.append(done))
    assert same(found, collected(store, tmp_path / "whole"))
    assert told == []


def test_what_is_there_is_not_collected_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collected(store, tmp_path)
    monkeypatch.setattr(module.Model, "open", lambda *_, **__: pytest.fail("the model was opened"))
    assert same(collected(store, tmp_path), found)


@pytest.mark.skipif(not has_native(), reason="torch sums in another order")
def test_chunks_make_no_difference(store: Store, tmp_path: Path) -> None:
    """A window of one chunk, or of several."""
    few = collected(store, tmp_path / "few", run=RunConfig(prefill_chunk=7))
    assert same(few, collected(store, tmp_path / "many"))


def test_the_floor_that_is_named_is_enough(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.resident_bytes()
    monkeypatch.setattr("flashinfer.machine.resident_bytes", lambda: here)
    with pytest.raises(CapTooSmallError, match="for looking on while this model runs; raise the cap") as caught:
        collected(store, tmp_path, cap=Cap(memory=1))
    floor = caught.value.floor
    assert str(floor) in str(caught.value)
    with pytest.raises(CapTooSmallError) as again:
        collected(store, tmp_path, cap=Cap(memory=floor - 1))
    assert again.value.floor == floor
    assert floor > here + observing_bytes(store.manifest.facts, RunConfig.prefill_chunk)
    assert same(collected(store, tmp_path, cap=Cap(memory=floor)), collected(store, tmp_path / "uncapped"))


def test_the_room_it_says_it_takes(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are measured whenever one has been finished."""
    most = 0
    whole_exit = module.SampleWriter.__exit__

    def measured(self, *error):
        nonlocal most
        whole_exit(self, *error)
        most = max(most, sum(p.stat().st_size for p in (tmp_path / ".calibrate").glob("layer-*")))

    monkeypatch.setattr(module.SampleWriter, "__exit__", measured)
    collected(store, tmp_path)
    room = sample_bytes(store.manifest.facts, len(IDS) + 6)
    assert most <= room <= most + (2 << 20)


def test_what_is_fitted_to() -> None:
    assert fit_span(80) == range(70)
    assert fit_span(8) == range(7)
    assert all(len(fit_span(n)) < n for n in range(8, 100))
