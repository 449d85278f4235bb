"""`benchmarks/sparse_reads.py`: what it notes is what decoding read, and fio is asked for reads of the same sizes."""

from __future__ import annotations

import contextlib
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sparse_reads
from flashinfer import pack
from flashinfer.bench.fio import find_fio
from flashinfer.config import Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, FlashInferError
from flashinfer.io import MemoryReader, open_reader
from flashinfer.request import files_of
from flashinfer.store import Store, open_store
from tests.plain_checkpoint import LLAMA, write_checkpoint

PROMPT, SCRIPT, WARM = [5, 17, 40, 3], [9, 60, 22, 31, 77], 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("sparse-reads")
    shape = {"hidden_size": 64, "intermediate_size": 330, "vocab_size": 96}
    pack(write_checkpoint(root / "checkpoint", LLAMA | shape, dtypes="f16"), root / "store")
    return open_store(root / "store")


@pytest.fixture(scope="module")
def tight(store: Store) -> Cap:
    """The smallest cap: hardly a slot, so almost everything that fires is read."""
    with pytest.raises(CapTooSmallError) as caught:
        Model.open(store, Cap(weight_memory=1))
    return Cap(weight_memory=caught.value.floor)


@pytest.fixture(scope="module")
def found(store: Store, tight: Cap) -> sparse_reads.Recorded:
    return sparse_reads.record(store, PROMPT, SCRIPT, warm=WARM, cap=tight, run=RunConfig(lookahead=False))


def test_what_is_noted_is_what_the_ledger_counts(store: Store, tight: Cap, found: sparse_reads.Recorded) -> None:
    """The oracle is the ledger of the same run made once more without noting: neurons are all that is useful."""
    with Model.open(store, tight, run=RunConfig(lookahead=False)) as model:
        session = model.session()
        model.step(session, PROMPT)
        for token in SCRIPT[:WARM]:
            model.step(session, [token])
        account = model.ledger.decode
        misses, size = account.misses, account.bytes_read
        for token in SCRIPT[WARM:]:
            model.step(session, [token])
        misses, size = account.misses - misses, account.bytes_read - size
    assert found.useful == misses * store.geometry(0).record_bytes
    assert found.useful <= found.log.total() <= size


def test_every_batch_is_waited_for_after_it_was_submitted(found: sparse_reads.Recorded) -> None:
    order = found.log.order
    assert sorted(step for step in order if step >= 0) == list(range(len(found.log.batches)))
    for number in range(len(found.log.batches)):
        assert order.index(number) < order.index(~number)


@pytest.mark.parametrize("how", [sparse_reads.as_decoded, sparse_reads.two_under_way])
def test_a_replay_reads_the_same(store: Store, found: sparse_reads.Recorded, how: object) -> None:
    with contextlib.closing(open_reader(files_of(store), IoConfig(depth=4, threads=2))) as reader:
        room = 4 * max(batch.total for batch in found.log.batches)
        with sparse_reads.AlignedBuffer(room) as buffer:
            places = cycle(np.array_split(buffer.array, 4))
            how(reader, found.log, places)  # type: ignore[operator]
        assert (reader.stats.bytes, reader.stats.reads) == (found.log.total(), len(found.log.lengths()))


def test_where_all_fits_there_is_nothing_to_measure(store: Store) -> None:
    with pytest.raises(FlashInferError, match="lower --memory"):
        sparse_reads.record(store, PROMPT, SCRIPT, warm=WARM, cap=Cap(), run=RunConfig())


@settings(max_examples=30)
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=400), st.sampled_from([512, 4096]))
def test_fios_sizes_are_ours(units: list[int], unit: int) -> None:
    lengths = np.array(units, dtype=np.int64) * unit
    pairs = [tuple(map(int, part.split("/"))) for part in sparse_reads.sizes_for_fio(lengths, unit).split(":")]
    assert sum(weight for _, weight in pairs) == 100
    assert len(pairs) <= 64  # what fio takes
    assert all(size % unit == 0 and lengths.min() <= size <= lengths.max() for size, _ in pairs)
    if len(units) % sparse_reads.STEPS == 0:
        mean = sum(size * weight for size, weight in pairs) / 100
        assert abs(mean - lengths.mean()) <= unit


@pytest.mark.skipif(find_fio() is None, reason="fio is not installed")
def test_the_report(store: Store, found: sparse_reads.Recorded) -> None:
    speeds = sparse_reads.replay(store, found, IoConfig(depth=4, threads=2), rounds=1)
    assert all(len(values) == 1 and values[0] > 0 for values in speeds.values())
    text = sparse_reads.report(store, found, speeds, IoConfig(depth=4, threads=2))
    assert "| as decoded |" in text
    assert str(Path(store.path_of(store.manifest.neurons)).parent) not in text


def test_other_files_are_not_noted() -> None:
    log = sparse_reads.Log(on=True)
    reader = sparse_reads.NotingReader(MemoryReader([bytes(8192), bytes(8192)]), log)
    one = sparse_reads.Extents(*(np.array([n]) for n in (0, 4096, 0)))
    with sparse_reads.AlignedBuffer(4096) as buffer:
        for file in (0, sparse_reads.NEURON_FILE):
            reader.submit(file, one, buffer.array).wait()
    assert (log.batches, log.order) == ([one], [0, ~0])
