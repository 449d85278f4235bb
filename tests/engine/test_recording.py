"""Recordings of activations: what went in comes out, whatever happens to the run, the disk or the file."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flashinfer import pack, recording
from flashinfer.engine import Model
from flashinfer.errors import RecordingError
from flashinfer.recording import Header, Mask, Recorder, gaps_of, header_of, ones_of, open_recording
from tests.e2e.program import DEMO, PROMPT, assert_failed, assert_interrupted, ended, flashinfer_with, names_in, started

HEADER = Header("llama", "relu", 8, (300, 40), "exact", "0" * 32, "a test")
Steps = list[list[Mask]]
"""By step, the mask `[tokens, neurons]` of each layer."""


@dataclass(frozen=True)
class Fake:
    """What an observer is shown, as far as a recorder looks at it."""

    active: Mask
    needed: Mask | None = None


def random_steps(count: int, seed: int = 0, header: Header = HEADER) -> Steps:
    """A chunk of seven tokens, then single ones; sparse, with tokens that need nobody."""
    rng = np.random.default_rng(seed)
    return [
        [rng.random((1 if i else 7, n)) < rng.choice([0, 0.01, 0.1, 1]) for n in header.neurons] for i in range(count)
    ]


def record(recorder: Recorder, steps: Steps) -> None:
    for step in steps:
        for layer, mask in enumerate(step):
            recorder.seen(layer, Fake(mask))


def recorded(path: Path, steps: Steps) -> Path:
    with Recorder(path, HEADER) as recorder:
        record(recorder, steps)
    return path


def read(path: Path, *, partial: bool = False) -> Steps:
    found = open_recording(path, partial=partial)
    layers = []
    for layer, neurons in enumerate(found.header.neurons):
        layers.append([[np.isin(np.arange(neurons), s) for s in sets] for sets in found.layer(layer)])
    return [list(map(np.array, step)) for step in zip(*layers, strict=True)]


def same(found: Steps, steps: Steps) -> bool:
    return len(found) == len(steps) and all(
        np.array_equal(a, b) for f, s in zip(found, steps, strict=True) for a, b in zip(f, s, strict=True)
    )


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 1200)),
    ones=st.lists(st.integers(0, 4799), max_size=30) | st.just(range(4800)),
)
def test_gaps_say_where_the_ones_are(shape: tuple[int, int], ones: Sequence[int]) -> None:
    mask = np.isin(np.arange(shape[0] * shape[1]), list(ones)).reshape(shape)
    gaps = gaps_of(mask)
    assert np.array_equal(ones_of(gaps), np.flatnonzero(mask))
    assert len(gaps) <= mask.size


@pytest.mark.parametrize("frame", [1, 700, recording.FRAME])
def test_what_went_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: int) -> None:
    monkeypatch.setattr(recording, "FRAME", frame)
    steps = random_steps(40)
    assert same(read(recorded(tmp_path / "r", steps)), steps)
    assert open_recording(tmp_path / "r").header == HEADER
    assert names_in(tmp_path) == ["r"]


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    """Byte for byte what docs/recording.md says, frames taken out of their compression."""
    header = msgspec.structs.replace(HEADER, neurons=(600, 4))
    with Recorder(tmp_path / "r", header) as recorder:
        recorder.seen(0, Fake(np.isin(np.arange(1200), [0, 257, 599, 602]).reshape(2, 600)))
        recorder.seen(1, Fake(np.array([[False] * 4, [True, False, False, True]])))
    data = (tmp_path / "r").read_bytes()
    described = (
        b'{"family":"llama","activation":"relu","hidden_size":8,"neurons":[600,4],"predictor":"exact",'
        b'"neuron_file":"00000000000000000000000000000000","generator":"a test"}'
    )
    start = b"flashinfer-activations 1\n" + len(described).to_bytes(4, "little") + described
    start += xxhash.xxh3_128_digest(described)
    assert data.startswith(start)
    size = int.from_bytes(data[len(start) : len(start) + 4], "little")
    frame = data[len(start) + 4 :]
    assert len(frame) == size
    assert zstandard.get_frame_parameters(frame).has_checksum
    parts = [
        (0, 2, bytes([0, 255, 1, 255, 86, 2])),
        (1, 2, bytes([4, 2])),
        (0xFFFFFFFF, 0, b""),
    ]
    expected = b"".join(b"".join(n.to_bytes(4, "little") for n in (a, b, len(c))) + c for a, b, c in parts)
    assert zstandard.decompress(frame) == expected


def test_the_named_neurons_are_recorded_where_a_predictor_names_some(tmp_path: Path) -> None:
    active, named = np.eye(2, 300, dtype=bool), np.ones((2, 300), dtype=bool)
    with Recorder(tmp_path / "r", HEADER) as recorder:
        recorder.seen(0, Fake(active, named))
        recorder.seen(1, Fake(active[:, :40], None))
    assert same(read(tmp_path / "r"), [[named, active[:, :40]]])


def test_a_step_that_was_given_up_is_left_out(tmp_path: Path) -> None:
    steps = random_steps(6)
    with Recorder(tmp_path / "r", HEADER) as recorder:
        for step in steps:
            recorder.seen(0, Fake(~step[0]))
            record(recorder, [step])
        recorder.seen(0, Fake(steps[0][0]))
    assert same(read(tmp_path / "r"), steps)


def test_memory_stays_small(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", HEADER) as recorder:
        for step in random_steps(3000):
            record(recorder, [step])
            assert len(recorder._content) < recording.FRAME
        assert recorder._size > 0


def test_a_killed_run_loses_at_most_the_last_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "FRAME", 600)
    steps = random_steps(60)
    recorder = Recorder(tmp_path / "r", HEADER)
    record(recorder, steps)
    [left] = tmp_path.iterdir()
    left.rename(tmp_path / "left")
    with pytest.raises(RecordingError, match=r"cut short.*--partial"):
        read(tmp_path / "left")
    found = read(tmp_path / "left", partial=True)
    assert same(found, steps[: len(found)])
    lost = sum(12 + len(gaps_of(mask)) for step in steps[len(found) + 1 :] for mask in step)
    assert lost < 600


def test_cut_anywhere_it_is_one_error_or_a_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "FRAME", 300)
    steps = random_steps(8)
    data = recorded(tmp_path / "r", steps).read_bytes()
    begin = open_recording(tmp_path / "r")._begin
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(RecordingError, match=r"cut short|header|not a recording|version"):
            read(tmp_path / "cut")
        if size >= begin:
            found = read(tmp_path / "cut", partial=True)
            assert same(found, steps[: len(found)])


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "FRAME", 300)
    steps = random_steps(6)
    data = recorded(tmp_path / "r", steps).read_bytes()
    refused = 0
    for at in range(len(data)):
        (tmp_path / "flipped").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert same(read(tmp_path / "flipped"), steps)
        except RecordingError:
            refused += 1
    assert refused > 0.98 * len(data)


def framed(content: bytes) -> bytes:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    return len(frame).to_bytes(4, "little") + frame


def part(layer: int, tokens: int, gaps: bytes, size: int | None = None) -> bytes:
    return b"".join(n.to_bytes(4, "little") for n in (layer, tokens, len(gaps) if size is None else size)) + gaps


LAST = part(0xFFFFFFFF, 0, b"")


@pytest.mark.parametrize(
    "body",
    [
        framed(part(0, 1, b"") + part(0, 1, b"")[:7]),
        framed(part(0, 1, b"", size=3)),
        framed(part(1, 1, b"") + LAST),
        framed(part(0, 1, b"") + part(2, 1, b"") + LAST),
        framed(part(0, 1, b"") + part(1, 2, b"") + LAST),
        framed(part(0, 0, b"") + part(1, 0, b"") + LAST),
        framed(part(0, 1, b"\xff\xff") + part(1, 1, b"\x28") + LAST),
        framed(LAST + part(0, 1, b"")),
        framed(LAST) + b"\0",
        b"\x04\0\0\0junk",
        b"\0\0\0\0",
    ],
)
def test_forged_steps_are_refused(tmp_path: Path, body: bytes) -> None:
    start = recorded(tmp_path / "r", []).read_bytes()[: open_recording(tmp_path / "r")._begin]
    (tmp_path / "r").write_bytes(start + body)
    with pytest.raises(RecordingError, match="damaged"):
        read(tmp_path / "r")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = recorded(tmp_path / "r", []).read_bytes()[: open_recording(tmp_path / "r")._begin]
    (tmp_path / "r").write_bytes(start + framed(bytes(10_000)))
    monkeypatch.setattr(recording, "LARGEST", 9_999)
    monkeypatch.setattr(zstandard, "decompress", lambda frame: pytest.fail("unpacked"))
    with pytest.raises(RecordingError, match="damaged"):
        read(tmp_path / "r")


def with_header(data: bytes) -> bytes:
    return recording.MAGIC + len(data).to_bytes(4, "little") + data + xxhash.xxh3_128_digest(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a recording"),
        (b"[\n{}]", "not a recording.*--record-activations"),
        (b"flashinfer-activations 2\n", "another version"),
        (recording.MAGIC + b"\xff\xff\xff\xff", "header"),
        (with_header(b"{}"), "header.*missing"),
        (with_header(msgspec.json.encode(msgspec.to_builtins(HEADER) | {"more": 1})), "header.*more"),
        (with_header(msgspec.json.encode(msgspec.to_builtins(HEADER) | {"neurons": []})), "header.*neurons"),
        (with_header(msgspec.json.encode(msgspec.to_builtins(HEADER) | {"neurons": [0]})), "header.*neurons"),
        (with_header(b"\xff"), "header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(RecordingError, match=says):
        open_recording(tmp_path / "r")


def test_a_place_without_a_file_is_one_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(RecordingError, match="cannot be read"):
            open_recording(place)
    with pytest.raises(RecordingError, match="is not a file"):
        Recorder(tmp_path, HEADER)
    with pytest.raises(RecordingError, match="cannot be written: No such"):
        Recorder(tmp_path / "none" / "r", HEADER)


def test_a_disk_that_fills_up_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r").write_text("the one before")
    recorder = Recorder(tmp_path / "r", HEADER)

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    record(recorder, random_steps(1500))
    assert len(recorder._content) < 2 * recording.FRAME
    with pytest.raises(RecordingError, match=r"No space left.*another name"):
        recorder.close()
    recorder.close()
    assert names_in(tmp_path) == ["r"]
    assert (tmp_path / "r").read_text() == "the one before"


@pytest.mark.parametrize("written", [0, 500])
def test_an_interrupt_while_writing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    monkeypatch.setattr(recording, "FRAME", 2000)
    pwrite, strikes = os.pwrite, iter([True])

    def struck(fd: int, data: bytes, at: int) -> int:
        if next(strikes, False):
            pwrite(fd, data[:written], at)
            raise KeyboardInterrupt
        return pwrite(fd, data[:777], at)  # a short write now and then

    monkeypatch.setattr(os, "pwrite", struck)
    steps = random_steps(60)
    struck_at = []
    with Recorder(tmp_path / "r", HEADER) as recorder:
        for i, step in enumerate(steps):
            try:
                record(recorder, [step])
            except KeyboardInterrupt:
                struck_at.append(i)
    [i] = struck_at
    found = read(tmp_path / "r")
    assert same(found, steps) or same(found, steps[:i] + steps[i + 1 :])


def test_an_error_on_its_way_is_the_one_that_is_told(tmp_path: Path) -> None:
    steps = random_steps(5)

    def run(path: Path) -> None:
        with Recorder(path, HEADER) as recorder:
            record(recorder, steps)
            path.mkdir() if path.name == "taken" else None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r")
    assert same(read(tmp_path / "r"), steps)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "taken")


def test_a_models_run_is_recorded_and_not_disturbed(packed, tmp_path: Path) -> None:
    """The recorded sets are those of the decision products, for prompt chunks and single tokens."""
    prompt, script = list(range(3, 40)), [7, 9, 11, 90]
    with Model.open(packed("llama").store, context=64) as model:
        session = model.session()
        plain = [model.step(session, prompt), *(model.step(session, [t]) for t in script)]
    seen: list[tuple[int, Mask]] = []

    class Both:
        def seen(self, layer: int, step) -> None:
            seen.append((layer, step.gate > 0))
            recorder.seen(layer, step)

    with (
        Model.open(packed("llama").store, context=64) as model,
        Recorder(tmp_path / "r", header_of(model.store.manifest, model.choice.kind)) as recorder,
    ):
        model.observe(Both())
        session = model.session()
        watched = [model.step(session, prompt), *(model.step(session, [t]) for t in script)]
        layers = model.facts.num_layers
    for a, b in zip(plain, watched, strict=True):
        assert np.array_equal(a, b)
    assert len(seen) == 5 * layers
    assert same(read(tmp_path / "r"), [[mask for _, mask in seen[i : i + layers]] for i in range(0, len(seen), layers)])
    assert any(mask.any() for _, mask in seen)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("demo") / "demo.flash"
    pack(DEMO, store)
    return store


OPTIONS = ("-p", PROMPT, "--temperature", "0", "--weight-memory", "7MiB")


def test_generate_records_and_says_the_same(demo: Path, tmp_path: Path) -> None:
    plain = flashinfer_with("generate", demo, *OPTIONS, "-n", "12")
    done = flashinfer_with("generate", demo, *OPTIONS, "-n", "12", "--record-activations", tmp_path / "r.act")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    found = open_recording(tmp_path / "r.act")
    assert (found.header.predictor, found.header.neurons) == ("exact", (1536,) * 5)
    for layer in range(5):
        first, *rest = found.layer(layer)
        assert len(first) > 2
        assert [len(step) for step in rest] == [1] * 11
        assert 20 < np.mean([len(token) for step in rest for token in step]) < 400
    assert names_in(tmp_path) == ["r.act"]


def test_ctrl_c_leaves_a_whole_recording(demo: Path, tmp_path: Path) -> None:
    process = started("generate", demo, *OPTIONS, "-n", "400", "--record-activations", tmp_path / "r.act")
    assert process.stdout is not None
    text = process.stdout.read(1)
    while len(text) < 40:
        text += process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    assert_interrupted(ended(process))
    assert len(list(open_recording(tmp_path / "r.act").layer(4))) > 3
    assert names_in(tmp_path) == ["r.act"]


def test_a_place_that_cannot_be_recorded_to(demo: Path, tmp_path: Path) -> None:
    for place, part in ((tmp_path, "is not a file"), (tmp_path / "no" / "r", "No such")):
        failed = flashinfer_with("generate", demo, *OPTIONS, "-n", "2", "--record-activations", place)
        assert_failed(failed, "recording", part, "another name")
    same_file = ("--record-activations", tmp_path / "t", "--trace", tmp_path / "t")
    assert_failed(flashinfer_with("generate", demo, *OPTIONS, *same_file), "a file of their own", status=2)
    assert names_in(tmp_path) == []
