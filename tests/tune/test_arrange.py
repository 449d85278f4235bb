"""Replays, held to the engine's own ledger and to a plain twin; and what is chosen by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.config import Cap, IoConfig, IoObjective, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.memory import Mode
from flashinfer.model.observe import Seen
from flashinfer.store import Geometry
from flashinfer.store.geometry import LARGEST_RECORD, choose_bundles_per_record, round_up
from flashinfer.tune.arrange import (
    Arrangement,
    Conditions,
    Traffic,
    arrange,
    choose_record_size,
    least,
    record_sizes,
    replay,
)
from tests.checkpoints import make_llama
from tests.tune.firings import Bits, grouped, packed

NEURONS = 1024
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 90, 24)]


class Recorder:
    """Keeps who contributed, by layer."""

    def __init__(self) -> None:
        self.rows: dict[int, list[npt.NDArray[np.bool_]]] = {}

    def seen(self, layer: int, step: Seen) -> None:
        self.rows.setdefault(layer, []).append(step.active.copy())


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with one and with three bundles of 512 bytes a record, permuted."""
    root = tmp_path_factory.mktemp("arrange")
    sizes = {"hidden_size": 64, "intermediate_size": NEURONS, "num_hidden_layers": 2, "hidden_act": "relu"}
    checkpoint = make_llama(root / "checkpoint", **sizes)
    orders = [np.random.default_rng(i).permutation(NEURONS).tolist() for i in range(2)]
    for count in (1, 3):
        pack(checkpoint, root / str(count), bundles_per_record=count, permutation=orders)
    return {count: root / str(count) for count in (1, 3)}


def cap_for(store: Path, run: RunConfig, mode: Mode) -> Cap:
    """Room for everything; for a cache, for some of the records."""
    if mode == "always-miss":
        return Cap()
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1), context=64, run=run, mode=mode)
    return Cap(weight_memory=e.value.floor + 700_000)


@pytest.mark.parametrize("staging", [64 << 10, 4 << 20], ids=["several batches", "one batch"])
@pytest.mark.parametrize("mode", ["always-miss", "cached"])
@pytest.mark.parametrize("objective", ["time", "bytes"])
@pytest.mark.parametrize("count", [1, 3])
def test_replays_read_what_the_engine_reads(
    stores: dict[int, Path], count: int, objective: IoObjective, mode: Mode, staging: int
) -> None:
    run = RunConfig(io=IoConfig(objective=objective), staging=staging, threads=1)
    recorder = Recorder()
    with Model.open(stores[count], cap_for(stores[count], run, mode), context=64, run=run, mode=mode) as model:
        model.observe(recorder)
        session = model.session()
        for token in TOKENS:
            model.step(session, [token])
        account, plan, alignment = model.ledger.decode, model.plan, model._reader.alignment
        geometries = [model.store.geometry(i) for i in range(2)]
    found = [
        replay(
            packed(np.concatenate(recorder.rows[i])),
            g,
            Conditions(run.io, run.cache, plan.slots[i] * g.record_bytes, plan.neuron_staging, alignment),
        )
        for i, g in enumerate(geometries)
    ]
    assert sum(f.records for f in found) * len(TOKENS) == pytest.approx(account.misses)
    if mode == "cached":
        assert 0 < plan.slots[0] < geometries[0].records
    else:  # everything else is resident, so that all that is read is neurons
        assert sum(f.extents for f in found) * len(TOKENS) == pytest.approx(account.reads)
        assert sum(f.bytes for f in found) * len(TOKENS) == pytest.approx(account.bytes_read)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Bits, Geometry]:
    neurons, count, bundle = draw(st.integers(1, 50)), draw(st.integers(1, 4)), draw(st.integers(1, 900))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    active = rng.random((draw(st.integers(1, 8)), neurons)) < draw(st.sampled_from([0.0, 0.2, 0.9]))
    order = rng.permutation(neurons) if draw(st.booleans()) else None
    return active, Geometry(neurons, count, round_up(count * bundle, 512), bundle, 4096, order)


@given(layers())
def test_replays_without_slots_read_the_runs_there_are(made: tuple[Bits, Geometry]) -> None:
    active, g = made
    runs = records = 0
    for row in active:
        touched = {int(g.positions(np.array([n]))[0]) // g.bundles_per_record for n in np.flatnonzero(row)}
        records += len(touched)
        runs += sum(r - 1 not in touched for r in touched)
    found = replay(packed(active), g, Conditions(IoConfig(objective="bytes")))
    assert found.records * len(active) == pytest.approx(records)
    assert found.extents * len(active) == pytest.approx(runs)
    assert found.bytes == pytest.approx(found.records * g.record_bytes)


@given(layers(), st.integers(0, 30))
def test_more_slots_never_read_what_no_slots_would_not(made: tuple[Bits, Geometry], slots: int) -> None:
    active, g = made
    without = replay(packed(active), g, Conditions())
    found = replay(packed(active), g, Conditions(slot_bytes=slots * g.record_bytes))
    assert found.records <= without.records
    whole = replay(packed(active), g, Conditions(slot_bytes=g.records * g.record_bytes))
    assert (whole.records, whole.extents, whole.bytes, whole.seconds) == (0, 0, 0, 0)


def test_tokens_that_only_warm_the_slots_are_not_counted() -> None:
    active = np.tile(np.arange(64) < 10, (5, 1))
    conditions = Conditions(slot_bytes=20 * 512)
    g = Geometry(64, 1, 512, 512, 0, np.arange(64)[::-1].copy())
    assert replay(packed(active), g, conditions).records == pytest.approx(10 / 5)
    assert replay(packed(active), g, replace(conditions, warm=1)).records == 0
    with pytest.raises(ValueError, match="leave none"):
        replay(packed(active), g, replace(conditions, warm=5))


@given(st.integers(1, 40_000), st.integers(1, 5000), st.sampled_from([512, 4096]))
def test_record_sizes_waste_less_and_less(bundle: int, neurons: int, alignment: int) -> None:
    sizes = record_sizes(bundle, neurons=neurons, alignment=alignment)
    assert sizes[0] == 1
    assert sizes == sorted(set(sizes))
    assert all(n <= neurons and n * bundle <= LARGEST_RECORD for n in sizes[1:])
    shares = [round_up(n * bundle, alignment) / n for n in sizes]
    assert shares == sorted(shares, reverse=True)


def test_the_objective_decides() -> None:
    frugal = Arrangement(None, 1, Traffic(1, 9, 1000, 3.0))
    nearly = Arrangement(None, 2, Traffic(1, 5, 1005, 2.0))
    fast = Arrangement(None, 3, Traffic(1, 1, 2000, 1.0))
    tried = [frugal, nearly, fast]
    assert least(tried, IoConfig(objective="time")) is fast
    assert least(tried, IoConfig(objective="bytes")) is nearly


@settings(max_examples=10)
@given(st.integers(0, 100), st.sampled_from(["time", "bytes"]))
def test_no_other_record_size_reads_less(seed: int, objective: IoObjective) -> None:
    active, _ = grouped(12, 90, 5, seed)
    conditions = Conditions(IoConfig(objective=objective), slot_bytes=9000)
    chosen = choose_record_size(packed(active), None, 768, neurons=90, conditions=conditions)
    for count in record_sizes(768, neurons=90, alignment=512):
        other = replay(packed(active), Geometry(90, count, round_up(count * 768, 512), 768, 0), conditions)
        if objective == "time":
            assert chosen.traffic.seconds <= other.seconds
        else:
            assert chosen.traffic.bytes <= other.bytes * 1.01


@pytest.mark.parametrize("slots", [0.0, 0.25])
@pytest.mark.parametrize("objective", ["time", "bytes"])
def test_groups_are_found_and_less_is_read_of_other_tokens(objective: IoObjective, slots: float) -> None:
    neurons, bundle = 640, 768
    active, _ = grouped(1000, neurons, 10, seed=4)
    learn, judge, test = (packed(part) for part in np.split(active, [600, 800]))
    conditions = Conditions(IoConfig(objective=objective), slot_bytes=int(slots * neurons * bundle))
    count = choose_bundles_per_record(bundle, neurons=neurons, alignment=512)
    before = replay(test, Geometry(neurons, count, round_up(count * bundle, 512), bundle, 0), conditions)
    tried = arrange(learn, judge, bundle, neurons=neurons, conditions=conditions)
    assert tried["original"].order is None
    best = least(list(tried.values()), conditions.io)
    assert best.order is not None
    g = Geometry(neurons, best.bundles_per_record, round_up(best.bundles_per_record * bundle, 512), bundle, 0)
    after = replay(test, replace(g, position_of=np.argsort(best.order)), conditions)
    assert after.bytes <= before.bytes
    assert 1.5 * after.seconds < before.seconds
    if objective == "bytes":
        assert 1.5 * after.extents <= before.extents
