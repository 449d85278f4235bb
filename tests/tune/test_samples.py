"""Sample files: what comes back is what went in, and nothing that is not whole is read."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.errors import DiskFullError, StoreError
from flashinfer.tune.samples import (
    Block,
    Collector,
    Samples,
    SampleWriter,
    chosen,
    pack_samples,
    sample_type,
    unpack_samples,
)

HIDDEN, NEURONS = 24, 50


def made(count: int, seed: int = 0, hidden: int = HIDDEN, neurons: int = NEURONS) -> Block:
    """Samples that f16 holds exactly, each with its number in the first place."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 8, (count, hidden)).astype(np.float32)
    x[:, 0] = np.arange(count)
    return Block(x, rng.random((count, neurons)) < 0.2)


def write(path: Path, block: Block, step: int = 7) -> Path:
    with SampleWriter(path, block.x.shape[1], block.active.shape[1]) as writer:
        for i in range(0, len(block.x), step):
            writer.add(block.x[i : i + step], block.active[i : i + step])
    return path


def same(a: Block, b: Block) -> bool:
    return bool((a.x == b.x).all() and (a.active == b.active).all() and a.x.shape == b.x.shape)


@pytest.mark.parametrize("step", [1, 7, 200])
def test_what_went_in_comes_out(tmp_path: Path, step: int) -> None:
    block = made(200)
    with Samples(write(tmp_path / "s", block, step)) as samples:
        assert (samples.hidden, samples.neurons, samples.count) == (HIDDEN, NEURONS, 200)
        assert same(samples.read(0, 200), block)
        assert same(samples.read(31, 32), Block(block.x[31:32], block.active[31:32]))
        parts = list(samples.blocks(range(5, 150), 64))
    assert [len(p.x) for p in parts] == [64, 64, 17]
    assert same(Block(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("x", "active"))), Block(
        block.x[5:150], block.active[5:150]
    ))  # fmt: skip


@given(st.integers(-140, 126), st.integers(1, 70), st.integers(1, 20), st.integers(0, 1000))
def test_inputs_of_any_size_lose_no_more_than_f16_does(power: int, hidden: int, neurons: int, seed: int) -> None:
    """Even where float16 has no such numbers; masks of any width come back."""
    rng = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        x = np.ldexp(rng.standard_normal((5, hidden)) * 10.0 ** rng.integers(-3, 1, (5, hidden)), power)
        x = np.clip(x, -3e38, 3e38).astype(np.float32)
        active = rng.random((5, neurons)) < 0.5
        back = unpack_samples(pack_samples(x, active), neurons)
        peak = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
        lost = np.abs(back.x.astype(np.float64) - x)
    least = np.maximum(peak * 2.0**-38, 2.0**-149)
    assert (lost <= np.maximum(np.abs(x) * 2.0**-11, least)).all()
    assert (back.active == active).all()


def test_an_input_of_zeros_comes_back() -> None:
    assert not unpack_samples(pack_samples(np.zeros((2, 3), np.float32), np.ones((2, 9), np.bool_)), 9).x.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_no_number_is_refused(bad: float) -> None:
    x = np.zeros((2, 3), np.float32)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="no finite number"):
        pack_samples(x, np.zeros((2, 4), np.bool_))


def test_a_file_cut_anywhere_is_not_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "s", made(20))
    whole = path.read_bytes()
    for size in {0, 1, 27, 28, 29, len(whole) // 2, len(whole) - 33, len(whole) - 32, len(whole) - 31, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="not whole"):
            Samples(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreError, match="not whole"):
        Samples(path)
    path.write_bytes(whole)
    with Samples(path) as samples:
        assert samples.count == 20


def test_a_lost_record_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "s", made(20))
    whole, each = path.read_bytes(), sample_type(HIDDEN, NEURONS).itemsize
    path.write_bytes(whole[:100] + whole[100 + each :])
    with pytest.raises(StoreError, match="not whole"):
        Samples(path)


def test_what_a_stopped_writer_left_is_not_whole(tmp_path: Path) -> None:
    block = made(20)
    with contextlib.suppress(KeyboardInterrupt), SampleWriter(tmp_path / "s", HIDDEN, NEURONS) as writer:
        writer.add(block.x, block.active)
        raise KeyboardInterrupt
    with pytest.raises(StoreError, match="not whole"):
        Samples(tmp_path / "s")


def test_a_file_without_samples_is_whole(tmp_path: Path) -> None:
    with SampleWriter(tmp_path / "s", HIDDEN, NEURONS):
        pass
    with Samples(tmp_path / "s") as samples:
        assert samples.count == 0
        with pytest.raises(ValueError, match="no samples"):
            next(samples.shuffled(range(0), 4, np.random.default_rng(0), 1000))


def test_masks_alone_are_samples_too(tmp_path: Path) -> None:
    block = Block(np.empty((40, 0), np.float32), made(40).active)
    with Samples(write(tmp_path / "s", block)) as samples:
        assert same(samples.read(0, 40), block)


def test_no_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        Samples(tmp_path / "none")
    with pytest.raises(StoreError, match="writing"):
        SampleWriter(tmp_path / "none" / "s", 1, 1)


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = made(20)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with SampleWriter(tmp_path / "s", HIDDEN, NEURONS) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DiskFullError, match="free some space"):
                writer.add(block.x, block.active)


@pytest.mark.parametrize("memory", [0, 3000, 1 << 20])
def test_a_turn_deals_every_sample_once(tmp_path: Path, memory: int) -> None:
    block = made(500)
    with Samples(write(tmp_path / "s", block)) as samples:
        batches = list(itertools.islice(samples.shuffled(range(20, 500), 32, np.random.default_rng(0), memory), 45))
    numbers = np.concatenate([b.x[:, 0] for b in batches]).astype(int)
    for turn in range(3):
        dealt = numbers[turn * 480 : (turn + 1) * 480]
        assert sorted(dealt) == list(range(20, 500))
        assert (dealt != np.arange(20, 500)).mean() > 0.9
    assert (numbers[:480] != numbers[480:960]).mean() > 0.9
    for b in batches:
        assert same(b, Block(block.x[b.x[:, 0].astype(int)], block.active[b.x[:, 0].astype(int)]))


def test_samples_left_over_of_a_turn_begin_the_next(tmp_path: Path) -> None:
    """7 batches of 30 are 3 turns of 70."""
    with Samples(write(tmp_path / "s", made(70))) as samples:
        batches = itertools.islice(samples.shuffled(range(70), 30, np.random.default_rng(1), 0), 7)
        numbers = [int(i) for b in batches for i in b.x[:, 0]]
    assert sorted(numbers) == sorted(3 * list(range(70)))


def test_batches_may_be_larger_than_the_span(tmp_path: Path) -> None:
    with Samples(write(tmp_path / "s", made(10))) as samples:
        batch = next(samples.shuffled(range(10), 25, np.random.default_rng(0), 0))
    assert len(batch.x) == 25


def test_a_seed_deals_the_same_batches(tmp_path: Path) -> None:
    with Samples(write(tmp_path / "s", made(300))) as samples:

        def numbers(seed: int) -> list[float]:
            batches = samples.shuffled(range(300), 16, np.random.default_rng(seed), 4000)
            return [float(i) for b in itertools.islice(batches, 40) for i in b.x[:, 0]]

        assert numbers(3) == numbers(3)
        assert numbers(3) != numbers(4)


def test_shuffling_keeps_to_its_memory(tmp_path: Path) -> None:
    """The file is ten times what the pool may take."""
    memory, size = 1 << 18, 16
    block = made(4 * (memory // sample_type(256, 512).itemsize), hidden=256, neurons=512)
    with Samples(write(tmp_path / "s", block, 512)) as samples:
        batch = size * (4 * 256 + 512)
        tracemalloc.start()
        try:
            for _ in itertools.islice(
                samples.shuffled(range(samples.count), size, np.random.default_rng(0), memory), 99
            ):
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert samples.count * samples.sample_bytes >= 3.9 * memory
        assert peak < memory + 2 * 64 * samples.sample_bytes + 6 * batch + (64 << 10)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop pages")
def test_nothing_stays_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is dropped after it was written, synced before, and after it was read."""
    dropped: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def spy(fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((offset, size))
        real(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", spy)
    block = made(3000, hidden=300)
    path = write(tmp_path / "s", block, 100)
    assert len(dropped) > 2
    assert sum(size for _, size in dropped) == path.stat().st_size
    assert [offset for offset, _ in dropped] == list(itertools.accumulate((s for _, s in dropped[:-1]), initial=0))
    dropped.clear()
    with Samples(path) as samples:
        samples.read(10, 20)
        assert (28 + 10 * samples.sample_bytes, 10 * samples.sample_bytes) in dropped


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(0, 400), st.lists(st.integers(0, 40), max_size=12))
def test_samples_are_spread_evenly_however_the_text_is_cut(total: int, wanted: int, cuts: list[int]) -> None:
    whole = chosen(0, total, total, wanted)
    assert len(whole) == min(wanted, total)
    if len(whole) > 1:
        gaps = np.diff(whole)
        assert gaps.max() - gaps.min() <= 1
    found, at = [], 0
    for count in [*cuts, total]:
        count = min(count, total - at)
        found += [at + int(i) for i in chosen(at, count, total, wanted)]
        at += count
    assert found == whole.tolist()


@dataclass(frozen=True)
class Step:
    x: np.ndarray
    active: np.ndarray


def test_a_collector_takes_the_same_tokens_of_every_layer(tmp_path: Path) -> None:
    layers = [made(100, 0), made(100, 1, hidden=16, neurons=9)]
    paths = [tmp_path / "0", tmp_path / "1"]
    with SampleWriter(paths[0], HIDDEN, NEURONS) as a, SampleWriter(paths[1], 16, 9) as b:
        collector = Collector([a, b], 100, 30)
        for start, stop in itertools.pairwise([0, 1, 50, 51, 100]):
            for layer, block in enumerate(layers):
                collector.seen(layer, Step(block.x[start:stop], block.active[start:stop]))
    rows = chosen(0, 100, 100, 30)
    for path, block in zip(paths, layers, strict=True):
        with Samples(path) as samples:
            assert same(samples.read(0, samples.count), Block(block.x[rows], block.active[rows]))
