"""The cache study: policies against naive twins, the optimum against all there is, the replay against the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashinfer
from flashinfer import cli
from flashinfer.bench.cache import Setting, geometries, settings_for, steps_of, study
from flashinfer.bench.replay import Blended, Index, Optimum, Ranked, Replayed, Runtime, Step, misses, next_uses
from flashinfer.cache import WindowCache
from flashinfer.config import CacheConfig, Cap, Retention, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import RecordingError, StoreError
from flashinfer.recording import Header, Recorder, header_of, open_recording
from flashinfer.store import Geometry, open_store
from flashinfer.units import MIB
from tests.engine.conftest import packed  # noqa: F401
from tests.engine.test_recording import Fake

RECORDS = 12
EVERY = [*settings_for([0, 1, 3])]


def steps_with(
    records: int, longest: int, sizes: st.SearchStrategy[int] | None = None
) -> st.SearchStrategy[list[Step]]:
    """Chunks and single tokens, counted and not."""
    one = st.sets(st.integers(0, records - 1)).map(lambda s: np.array(sorted(s), dtype=np.int64))
    step = st.tuples(st.lists(one, min_size=1, max_size=3), st.booleans()).map(lambda p: made(p[0], counted=p[1]))
    return st.lists(step, max_size=longest)


def made(sets: Sequence[Index], *, counted: bool = True) -> Step:
    return Step(tuple(sets), np.unique(np.concatenate(sets)), counted)


def single(*records: int) -> Step:
    return made([np.array(records, dtype=np.int64)])


def naive(steps: Sequence[Step], slots: int, *, frequency: bool) -> list[set[int]]:
    """Sets and sorting, as the words say it; the records kept after each step."""
    kept: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    uses: dict[int, int] = {}
    clock, out = 0, []
    for step in steps:
        for used in step.sets:
            clock += 1
            for r in used.tolist():
                last[r], uses[r] = (clock, r), uses.get(r, 0) + 1
        needed = set(step.needed.tolist())
        stays = kept & needed
        others = sorted((kept | needed) - stays, key=lambda r: (uses[r] if frequency else 0, last[r]), reverse=True)
        kept = stays | set(others[: max(0, slots - len(stays))])
        out.append(kept)
    return out


@settings(max_examples=200, deadline=None)
@given(steps=steps_with(RECORDS, 15), slots=st.integers(0, RECORDS + 2), frequency=st.booleans())
def test_lru_and_lfu_are_their_naive_twins(steps: list[Step], slots: int, frequency: bool) -> None:
    policy = Ranked(RECORDS, slots, frequency=frequency)
    for step, expected in zip(steps, naive(steps, slots, frequency=frequency), strict=True):
        policy.step(step)
        assert set(policy.kept().tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(steps=steps_with(RECORDS, 15), slots=st.integers(0, RECORDS + 2), setting=st.sampled_from(EVERY))
def test_every_policy_keeps_the_rules(steps: list[Step], slots: int, setting: Setting) -> None:
    policy = setting.make(RECORDS, slots, steps)
    before: set[int] = set()
    for step in steps:
        needed, missed = set(step.needed.tolist()), policy.step(step)
        after = set(policy.kept().tolist())
        assert missed == len(needed - before)
        assert len(after) <= slots
        assert after <= before | needed
        if setting.kind != "optimum":
            assert needed & before <= after
        before = after


@settings(max_examples=100, deadline=None)
@given(steps=steps_with(RECORDS, 12), slots=st.integers(0, RECORDS))
def test_nothing_misses_less_than_the_optimum(steps: list[Step], slots: int) -> None:
    best = misses(Optimum(RECORDS, slots, steps), steps)
    for setting in EVERY:
        assert misses(setting.make(RECORDS, slots, steps), steps) >= best


@given(steps=steps_with(RECORDS, 15))
def test_with_room_for_all_only_first_uses_miss(steps: list[Step]) -> None:
    seen: set[int] = set()
    first = 0
    for step in steps:
        first += step.counted * len(set(step.needed.tolist()) - seen)
        seen |= set(step.needed.tolist())
    for setting in EVERY:
        missed = misses(setting.make(RECORDS, RECORDS, steps), steps)
        assert missed >= first if setting.kind == "window" else missed == first


def fewest(steps: Sequence[Step], slots: int) -> int:
    """The optimum by trying every choice of what to keep."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for step in steps:
        needed, after = set(step.needed.tolist()), dict[frozenset[int], int]()
        for kept, cost in costs.items():
            cost += step.counted * len(needed - kept)
            there = sorted(kept | needed)
            for size in range(min(slots, len(there)) + 1):
                for choice in combinations(there, size):
                    after[frozenset(choice)] = min(cost, after.get(frozenset(choice), cost))
        costs = after
    return min(costs.values())


@settings(max_examples=150, deadline=None)
@given(steps=steps_with(5, 7), slots=st.integers(0, 5))
def test_the_optimum_is_the_fewest_possible(steps: list[Step], slots: int) -> None:
    assert misses(Optimum(5, slots, steps), steps) == fewest(steps, slots)


def test_next_uses_skip_nothing_and_do_not_count_what_is_not_counted() -> None:
    never = np.iinfo(np.int64).max
    steps = [single(0, 1), made([np.array([1, 2])], counted=False), single(0), single(1, 2)]
    assert [n.tolist() for n in next_uses(3, steps)] == [[2, never], [3, 3], [never], [never, never]]


def test_a_set_larger_than_the_slots_is_transient() -> None:
    """What is there stays; of the rest as many as there is room for, the others are missed again."""
    for policy in (Ranked(6, 2, frequency=False), Ranked(6, 2, frequency=True), Blended(6, 2)):
        assert [policy.step(single(0, 1, 2, 3)) for _ in range(3)] == [4, 2, 2]


def test_lfu_resists_a_scan_and_lru_does_not() -> None:
    hot, scan = [single(0, 1)] * 5, [single(i) for i in range(2, 8)]
    steps = [*hot, *scan, single(0, 1)]
    assert misses(Ranked(8, 2, frequency=True), steps) == 2 + 6
    assert misses(Ranked(8, 2, frequency=False), steps) == 2 + 6 + 2


def test_the_blend_prefers_what_was_just_used_and_remembers_what_was_used_often() -> None:
    blend = Blended(9, 2)
    for step in [*[single(0)] * 40, single(1), single(2)]:
        blend.step(step)
    assert blend.kept().tolist() == [0, 2]
    for i in range(40):
        blend.step(single(3 + i % 6))
    assert 0 in blend.kept().tolist()


def test_the_blends_sums_stay_finite() -> None:
    policy, plain = Blended(9, 4), Blended(9, 4)
    plain.LONGEST = 10_000  # type: ignore[misc]
    rng = np.random.default_rng(0)
    for i in range(3000):
        step = single(*np.flatnonzero(rng.random(9) < 0.3).tolist())
        policy.step(step)
        if i < 2000:
            plain.step(step)
        if i == 1999:
            assert policy.kept().tolist() == plain.kept().tolist()
    assert np.isfinite(policy._fast).all()
    assert policy._fast.max() < 2.0**200


def test_too_many_records_for_the_sort_key_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        Ranked(1 << 21, 1, frequency=True)


def test_records_are_those_of_the_geometry() -> None:
    order = np.array([3, 1, 2, 0, 4])
    geometry = Geometry(5, 2, 512, 256, 0, position_of=np.argsort(order))
    chunk, token = [np.array([0, 3]), np.array([1])], [np.array([4])]
    steps = steps_of([chunk, token, token, chunk], geometry, 1)
    assert [[s.tolist() for s in step.sets] for step in steps] == [[[0, 1], [0]], [[2]], [[2]], [[0, 1], [0]]]
    assert [step.needed.tolist() for step in steps] == [[0, 1], [2], [2], [0, 1]]
    assert [step.counted for step in steps] == [False, False, True, False]


# -- recordings of an engine's run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of the embedded model, and a recording of a prompt and sixty tokens."""
    root = tmp_path_factory.mktemp("run")
    store, path = root / "store", root / "r.act"
    flashinfer.pack(Path(flashinfer.__file__).parent / "_demo", store)
    with Model.open(store, context=96) as model, Recorder(path, header_of(model.store.manifest, "exact")) as recorder:
        model.observe(recorder)
        generate(model)
    return store, path


def generate(model: Model) -> None:
    """A prompt and sixty tokens, the same every time."""
    session = model.session()
    for tokens in [list(range(300, 322)), *([t] for t in np.random.default_rng(5).integers(300, 400, 60).tolist())]:
        model.step(session, tokens)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("retention", get_args(Retention))
def test_the_replay_is_what_the_engine_does(run: tuple[Path, Path], window: int, retention: Retention) -> None:
    """The same records missed, to the last, with slots for half of them; loaded beforehand is what the engine loads."""
    store, path = run
    cache = CacheConfig(window, retention)
    with Model.open(store, Cap(weight_memory=8 * MIB), context=96, run=RunConfig(cache=cache)) as model:
        generate(model)
        slots, account = model.plan.slots, model.ledger.decode
    recording = open_recording(path)
    found = needed = 0
    for i, geometry in enumerate(geometries(recording, store, 1)):
        assert 0.2 < slots[i] / geometry.records < 0.8
        own = WindowCache(geometry.records, slots[i], window=window, retention=retention)
        own.preload(np.arange(slots[i]))
        steps = steps_of(recording.layer(i), geometry, 0)
        needed += sum(len(step.needed) for step in steps if step.counted)
        found += misses(Runtime(own), steps)
    assert (found, needed) == (account.misses, account.hits + account.misses)


def test_a_study_adds_up(run: tuple[Path, Path]) -> None:
    store, path = run
    recording = open_recording(path)
    done = study(recording, geometries(recording, store, 1), shares=[0.1, 0.5, 1.0], settings=EVERY, skip=4)
    assert (done.tokens, done.warm) == (56, 22 + 4)
    rows = done.to_json()["rows"]
    assert len(rows) == 3 * len(EVERY)
    for row in rows:
        assert row["hits"] + row["misses"] == pytest.approx(done.needed)
        assert row["missed_per_token"] * 56 == pytest.approx(row["misses"])
        best = next(r for r in rows if r["policy"] == "optimum" and r["share"] == row["share"])
        assert row["misses"] >= best["misses"]
    assert done.record_bytes == open_store(store).manifest.layers[0].record_bytes
    several = study(recording, geometries(recording, None, 4), shares=[0.5], settings=[Setting("LRU")])
    assert (several.tokens, several.records) == (60, 5 * 1536 // 4)


def test_what_cannot_be_studied_is_refused(run: tuple[Path, Path], packed, tmp_path: Path) -> None:  # noqa: F811
    store, path = run
    recording = open_recording(path)
    with pytest.raises(RecordingError, match=r"llama model.*give the store of the recorded model"):
        geometries(recording, packed("opt").store, 1)
    with pytest.raises(StoreError):
        geometries(recording, tmp_path, 1)
    with pytest.raises(RecordingError, match="none of them decoded after the first 60"):
        study(recording, geometries(recording, store, 1), settings=EVERY, skip=60)


def test_the_command_prints_a_table(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    store, path = run
    arguments = ["bench", "cache", str(path), "--store", str(store), "--budgets", "50%,0.1,100%", "--window", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if "%" in line]
    assert "60 decode tokens are counted, 22 tokens before them" in out
    assert [line[0] for line in lines] == ["10%", "50%", "100%"]
    assert all(len(line) == 1 + 2 * 6 for line in lines)
    assert max(map(len, out.splitlines()[2:])) <= 80
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema_version"], report["command"], report["tokens"]) == (1, "bench cache", 60)
    assert {row["policy"] for row in report["rows"]} == {s.kind for s in EVERY}
    table = {f"{row['hit_rate']:.0%}" for row in report["rows"] if row["share"] == 0.5}
    assert table == set(lines[1][2::2])


def test_a_recording_that_was_cut_short_is_one_line(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.act"
    header = Header("llama", "relu", 8, (40,), "exact", "0" * 32, "a test")
    rng = np.random.default_rng(0)
    recorder = Recorder(cut, header)
    for _ in range(9000):
        recorder.seen(0, Fake(rng.random((1, 40)) < 0.2))
    [left] = tmp_path.iterdir()
    left.rename(cut)
    assert cli.main(["bench", "cache", str(cut), "--budgets", "50%"]) == 1
    err = capsys.readouterr().err
    assert "is cut short" in err
    assert err.count("\n") == 1
    assert cli.main(["bench", "cache", str(cut), "--budgets", "50%", "--partial"]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budgets", "10%,120%"], "more than all"),
        (["--budgets", "10%,"], "not a share"),
        (["--budgets", "a lot"], "not a share"),
        (["--store", "x", "--bundles-per-record", "2"], "not both"),
        (["--window", "-1"], "--window"),
    ],
)
def test_wrong_options_are_wrong_usage(
    run: tuple[Path, Path], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "cache", str(run[1]), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


def test_policies_follow_the_protocol() -> None:
    policies: list[Replayed] = [setting.make(4, 2, []) for setting in EVERY]
    assert all(policy.kept().tolist() == [] for policy in policies)
