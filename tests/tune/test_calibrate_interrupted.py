"""Calibrations that were stopped: the store is as it was, and the next one comes to the same as if nothing had been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flashinfer.errors import DiskFullError, StoreError
from flashinfer.store import open_store, verify
from flashinfer.tune import calibrate as calibration
from flashinfer.tune import collect
from flashinfer.tune.calibrate import Report
from flashinfer.tune.work import NAME
from tests.tune.calibrating import QUICK, calibrated, contents, copy_of, make_store, words

STAGES = {
    "relu": [
        "running the text", "low-rank predictors", "neuron order", "rewriting the weights", "writing predictors",
        "judging exact", "judging low-rank:0.9", "judging low-rank:0.9 and counting",
    ],
    "silu": [
        "running the text", "thresholds", "rewriting the weights", "writing predictors", "judging exact",
        "judging threshold:0.5", "judging threshold:0.5 and counting",
    ],
}  # fmt: skip
OFTEN = [("relu", "running the text"), ("relu", "neuron order"), ("silu", "thresholds")]


pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is run in four parts."""
    monkeypatch.setattr(collect, "PART", 32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(150))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only: who calibrates takes a copy. The gated one in records that suit no threshold."""
    packing = {"relu": {}, "silu": {"bundles_per_record": 64}}
    return {kind: make_store(tmp_path_factory.mktemp(kind), kind, **packing[kind]) for kind in packing}


class Recorded:
    """What is made of each kind when nobody interrupts, and the titles that are told."""

    def __init__(self, packed: dict[str, Path], text: Path, folder: Path) -> None:
        self.titles: dict[str, list[str]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        for kind, store in packed.items():
            told: list[str] = []
            path = copy_of(store, folder / kind)
            calibrated(path, text, progress=lambda what, done, total, told=told: told.append(what))
            self.titles[kind] = list(dict.fromkeys(told))
            self.files[kind] = contents(path)


@pytest.fixture(scope="module")
def whole(packed: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "PART", 32)
        return Recorded(packed, text, tmp_path_factory.mktemp("whole"))


class At:
    """Interrupts at some call with that title."""

    def __init__(self, title: str, call: int = 1) -> None:
        self.title, self.left = title, call

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.left -= what == self.title
        if self.left == 0:
            raise KeyboardInterrupt


def stopped(store: Path, text: Path, at: At) -> None:
    """Interrupt a calibration of a store; the store is as it was."""
    before = contents(store)
    with pytest.raises(KeyboardInterrupt):
        calibrated(store, text, progress=at)
    assert contents(store) == before
    assert verify(open_store(store)) == []


def noted(store: Path) -> dict[str, object]:
    """What is known to be done."""
    done: dict[str, object] = json.loads((store / NAME / "state.json").read_bytes())["done"]
    return done


def assert_finishes(store: Path, text: Path, whole: Recorded, kind: str) -> Report:
    """Calibrating once more, with the same arguments, goes on and comes to the same, byte for byte."""
    known = bool(noted(store))
    report = calibrated(store, text)
    assert report.resumed == known
    assert contents(store) == whole.files[kind]
    assert not (store / NAME).exists()
    return report


def test_the_stages_are_these(whole: Recorded) -> None:
    assert whole.titles == STAGES


@pytest.mark.parametrize("kind", STAGES)
def test_at_the_beginning_of_each_stage(packed, text: Path, whole: Recorded, kind: str, tmp_path: Path) -> None:
    """One after the other: each goes on where the one before was stopped, and comes one stage further."""
    path, known = copy_of(packed[kind], tmp_path / "store"), 0
    for title in STAGES[kind]:
        stopped(path, text, At(title))
        assert len(noted(path)) >= known
        known = len(noted(path))
    assert_finishes(path, text, whole, kind)


@pytest.mark.parametrize(("kind", "title"), OFTEN)
def test_in_the_middle_of_a_stage_twice(packed, text: Path, whole: Recorded, kind: str, title: str, tmp_path: Path):
    path = copy_of(packed[kind], tmp_path / "store")
    stopped(path, text, At(title, 2))
    known = len(noted(path))
    stopped(path, text, At(title))
    assert len(noted(path)) >= known
    assert_finishes(path, text, whole, kind)


def test_what_is_done_is_not_done_again(packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
    path = copy_of(packed["relu"], tmp_path / "store")
    stopped(path, text, At("writing predictors"))
    told: list[str] = []
    calibrated(path, text, progress=lambda what, done, total: told.append(what))
    assert "running the text" not in told
    assert told.count("low-rank predictors") == told.count("neuron order") == 2  # they are only looked up


def test_parts_of_the_text_are_not_run_again(packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
    path = copy_of(packed["relu"], tmp_path / "store")
    stopped(path, text, At("running the text", 3))
    told: list[tuple[int, int]] = []
    calibrated(path, text, progress=lambda what, *now: told.append(now) if what == "running the text" else None)
    total = told[-1][1]
    assert told[0][0] > 32
    assert told[-1] == (total, total)
    assert len(told) < 4


@pytest.mark.parametrize("change", ["seed", "text", "weights"])
def test_another_calibration_begins_anew(packed: dict[str, Path], text: Path, change: str, tmp_path: Path) -> None:
    """What an earlier one left is of no use to it, and is thrown away."""
    path, fresh = copy_of(packed["relu"], tmp_path / "store"), copy_of(packed["relu"], tmp_path / "fresh")
    stopped(path, text, At("neuron order"))
    options, other = QUICK, text
    if change == "seed":
        options = replace(QUICK, seed=7)
    elif change == "text":
        other = tmp_path / "other.txt"
        other.write_text(words(150, seed=1))
    else:
        fresh = make_store(tmp_path / "made", "relu", seed=3)
        (path / NAME).rename(tmp_path / "work")
        path = copy_of(fresh, tmp_path / "second")
        (tmp_path / "work").rename(path / NAME)
    assert not calibrated(path, other, options).resumed
    assert not calibrated(fresh, other, options).resumed
    assert contents(path) == contents(fresh)


@pytest.mark.parametrize(
    ("kind", "title", "pattern", "damage"),
    [
        ("relu", "low-rank predictors", "*.samples", "gone"),
        ("relu", "neuron order", "*.rank-*.npz", "cut"),
        ("relu", "writing predictors", "*.order.npz", "gone"),
        ("silu", "writing predictors", "*.thresholds.npz", "cut"),
    ],
)
def test_what_was_kept_is_damaged(
    packed, text: Path, whole: Recorded, kind: str, title: str, pattern: str, damage: str, tmp_path: Path
) -> None:
    """One clear error; the time after that it begins anew instead of failing for ever."""
    path = copy_of(packed[kind], tmp_path / "store")
    stopped(path, text, At(title))
    kept = sorted((path / NAME).glob(pattern))
    assert kept
    for file in kept:
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = contents(path)
    with pytest.raises(StoreError, match="calibrate again"):
        calibrated(path, text)
    assert contents(path) == before
    report = calibrated(path, text)
    assert not report.resumed
    assert contents(path) == whole.files[kind]


def test_a_full_disk_keeps_the_work(packed, text: Path, whole: Recorded, tmp_path: Path, monkeypatch) -> None:
    path = copy_of(packed["relu"], tmp_path / "store")
    stopped(path, text, At("neuron order"))
    before = contents(path)

    def no_room(*_: object, **__: object) -> None:
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("flashinfer.tune.make.rewrite", no_room)
        with pytest.raises(DiskFullError, match="no room"):
            calibrated(path, text)
    assert contents(path) == before
    assert assert_finishes(path, text, whole, "relu").resumed


def test_room_is_not_asked_for_twice(packed: dict[str, Path], text: Path, tmp_path: Path, monkeypatch) -> None:
    """What lies there already is part of what a resumed one needs."""
    needs: list[int] = []
    whole_update = calibration.StoreUpdate

    def watched(store, *, need):
        needs.append(need)
        return whole_update(store, need=need)

    monkeypatch.setattr(calibration, "StoreUpdate", watched)
    path = copy_of(packed["relu"], tmp_path / "store")
    stopped(path, text, At("low-rank predictors"))
    kept = sum(file.stat().st_size for file in (path / NAME).iterdir())
    stopped(path, text, At("neuron order"))
    assert needs[0] > needs[1] == max(0, needs[0] - kept)
