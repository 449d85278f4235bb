"""Slots on a device that are filled by reads straight to it: the same bits, and every byte counted, once.

The device is the CPU (`backend.APART`), as in `test_device.py`; the reader is one of memory that reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import backend as backends
from flashinfer.backend import APART
from flashinfer.bench.promise import promise
from flashinfer.config import BOUNCE_BUFFER, FILE_ALIGNMENT, Cap, IoConfig, ReaderName, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, DeviceError, StoreReadError
from flashinfer.io import AlignedBuffer, DeviceReader, Extents, KvikioReader, Pending, ThreadReader
from flashinfer.ledger import Ledger
from flashinfer.model.reads import Reads
from flashinfer.model.slots import Slots
from flashinfer.model.uploads import Uploads
from flashinfer.store import Geometry, open_store
from flashinfer.store.geometry import round_up
from tests.backend.late_copies import GARBAGE, LateCopies
from tests.engine.strict_reader import StrictReader
from tests.engine.test_device import (  # noqa: F401 - `stores` is a fixture
    BACKENDS,
    CONTEXT,
    DECODED,
    LARGE,
    PROMPT,
    expected,
    stores,
)
from tests.io.device_memory import PretendedMemory
from tests.io.kvikio_stand_in import StandIn, install

Bytes = npt.NDArray[np.uint8]
READERS: tuple[ReaderName, ...] = ("threads", "kvikio")


class Reaching(StrictReader):
    """As StrictReader, to the memory of the CPU as a device, too. `reached`: bytes read there; `places`: between which
    of its addresses."""

    def __init__(self, paths: Sequence[Path], alignment: int = 512) -> None:
        super().__init__([path.read_bytes() for path in paths], alignment=alignment)
        self.reached = 0
        self.places: list[tuple[int, int]] = []

    def submit_to_device(self, file: int, extents: Extents, target: Bytes) -> Pending:
        every = extents.offsets | extents.lengths | extents.targets
        assert not (every % FILE_ALIGNMENT).any()
        self.reached += extents.total
        start = target.ctypes.data
        self.places.append((start, start + len(target)))
        return self.submit(file, extents, target)


class LateZeros(LateCopies):
    """As LateCopies, where the zeros of what is allocated are written late, too. It begins where a device's would."""

    def allocate(self, size: int) -> Any:
        memory = AlignedBuffer(len(super().allocate(size))).array
        memory[:] = np.uint8(GARBAGE)
        self._asked.append(lambda: memory.fill(0) or 0)
        return memory


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HostCopies", LateZeros)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([512, 1536, 4096, 6144]),
    near=st.integers(0, 40),
    far=st.integers(0, 40),
    half=st.sampled_from([8192, 12_288, 65_536]),
    alignment=st.sampled_from([512, 4096]),
)
def test_every_record_comes_to_its_slot(tmp_path, size, near, far, half, alignment) -> None:
    """Through halves that may hold one record or all, and nothing beside slots and halves is written to."""
    offset, records = 2 * FILE_ALIGNMENT, near + far + 1
    path = tmp_path / "neurons"
    path.write_bytes(np.random.default_rng(size).bytes(round_up(offset + records * size, FILE_ALIGNMENT)))
    there = round_up(near * size, FILE_ALIGNMENT)
    copies, ledger = LateZeros(1 << 24), Ledger()
    first = FILE_ALIGNMENT + there
    device: Any = SimpleNamespace(slots=[FILE_ALIGNMENT], half=half, halves=(first, first + half))
    device.memory = copies.allocate(first + 2 * half)
    uploads, reader = Uploads(copies, device, ledger), Reaching([path], alignment)
    host: Any = SimpleNamespace(bytes=AlignedBuffer(round_up(far * size, FILE_ALIGNMENT)).array, slots=[0], staging=0)
    plan: Any = SimpleNamespace(device=SimpleNamespace(slots=(near,)), slots=(far,))
    slots = Slots([Geometry(records, 1, size, size, offset)], plan, None, host, uploads, ledger)
    loaded = slots.load(0, Reads(reader, 0, "neurons", ledger), alignment, 20_480)
    uploads.wait()
    every = np.frombuffer(path.read_bytes(), dtype=np.uint8)[offset:][: records * size].reshape(records, size)
    found = np.concatenate((device.memory[FILE_ALIGNMENT:][: near * size], host.bytes[: far * size]))
    assert np.array_equal(found.reshape(-1, size), every[loaded])
    assert sorted(loaded) == list(range(near + far))
    assert not device.memory[:FILE_ALIGNMENT].any()
    assert not device.memory[FILE_ALIGNMENT + near * size : first].any()
    assert ledger.current.copied_bytes == 0


def opened(store: Path, cap: Cap, run: RunConfig, readers: list[Any], kind: Any = Reaching, **options: Any) -> Model:
    """The model, and its reader in the list."""

    def reader_of(paths: Sequence[Path]) -> Any:
        readers.append(kind(paths, **options))
        return readers[-1]

    return Model.open(store, cap, context=CONTEXT, run=run, device=APART, reader_of=reader_of)


@cache
def floors_of(store: Path, run: RunConfig, alignment: int = 512) -> tuple[int, int]:
    """Of the host, and of the device."""
    found = []
    for cap in (Cap(weight_memory=1, vram=LARGE), Cap(weight_memory=LARGE, vram=1)):
        with pytest.raises(CapTooSmallError) as e:
            opened(store, cap, run, [], alignment=alignment)
        found.append(e.value.floor)
    return found[0], found[1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(["sparse", "records", "dense", "opt", "experts"]),
    backend=st.sampled_from(BACKENDS),
    host=st.floats(0, 1.1),
    there=st.floats(0, 1.1),
    alignment=st.sampled_from([512, 4096]),
    max_extent=st.sampled_from([4096, 20_480, 1 << 20]),
    staging=st.sampled_from([0, 100_000]),
)
def test_bit_for_bit(stores, case, backend, host, there, alignment, max_extent, staging) -> None:  # noqa: F811
    run = RunConfig(backend=backend, staging=staging, threads=1, io=IoConfig(max_extent=max_extent))
    size, least = open_store(stores[case]).manifest.weight_bytes(), floors_of(stores[case], run, alignment)
    cap = Cap(weight_memory=least[0] + int(host * size), vram=least[1] + int(there * size))
    readers: list[Reaching] = []
    with opened(stores[case], cap, run, readers, alignment=alignment) as model:
        check_counts(model, readers[0])
        session = model.session()
        found = [model.logits(session, PROMPT), *(model.step(session, [token]) for token in DECODED)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected(stores[case], backend, "cached"), strict=True))


def check_counts(model: Model, reader: Reaching) -> None:
    """What was loaded: of the slots on the device as much as was read there, no more than the pages that it takes, and
    none of it copied, in either direction; of matrices, what was copied."""
    plan, layers, load = model.plan, model.store.manifest.layers, model.ledger.load
    assert plan.device is not None
    slots = sum(near * layer.record_bytes for near, layer in zip(plan.near, layers, strict=True))
    parts = sum(
        -(-near * layer.record_bytes // plan.device.half) for near, layer in zip(plan.near, layers, strict=True)
    )
    assert slots <= load.bytes_to_device <= slots + 2 * FILE_ALIGNMENT * parts
    assert load.bytes_to_device == reader.reached <= load.bytes_read == reader.stats.bytes
    assert load.copied_bytes == sum(model.store.manifest.tensors[name].bytes for name in plan.device.resident)
    assert load.copied_back_bytes == 0
    arena: Any = model._weights._uploads.arena
    start = arena.memory.ctypes.data + arena.halves[0]
    assert all(start <= a <= b <= start + 2 * arena.half for a, b in reader.places)


def test_a_reader_that_does_not_reach_it_reads_to_the_host(stores) -> None:  # noqa: F811
    """The same bytes are copied then."""
    assert not isinstance(StrictReader([]), DeviceReader)
    cap, readers = Cap(weight_memory=LARGE, vram=LARGE), []
    with opened(stores["dense"], cap, RunConfig(threads=1), readers) as model:
        straight = replace(model.ledger.load)
    with Model.open(stores["dense"], cap, context=CONTEXT, run=RunConfig(threads=1), device=APART) as model:
        around, layers = model.ledger.load, model.store.manifest.layers
    assert around.bytes_to_device == 0
    assert around.copied_bytes - straight.copied_bytes == sum(layer.bytes for layer in layers)
    assert around.useful_bytes == straight.useful_bytes
    assert straight.bytes_to_device > 0


def test_a_read_to_the_device_that_fails_is_one_line(stores) -> None:  # noqa: F811
    class Broken(Reaching):
        def submit_to_device(self, file: int, extents: Extents, target: Bytes) -> Pending:
            self.fail_at = {(file, int(extents.offsets[0]))}
            return super().submit_to_device(file, extents, target)

    readers: list[Broken] = []
    with pytest.raises(StoreReadError, match="Input/output error; check the disk"):
        opened(stores["dense"], Cap(weight_memory=LARGE, vram=LARGE), RunConfig(threads=1), readers, Broken)
    with pytest.raises(ValueError, match="closed"):
        readers[0].submit(0, Extents(*np.zeros((3, 0), dtype=np.int64)), np.zeros(0, dtype=np.uint8))


def test_its_buffers_on_the_host_count_against_the_cap(stores) -> None:  # noqa: F811
    least = {name: floors_of(stores["dense"], RunConfig(io=IoConfig(reader=name, threads=3))) for name in READERS}
    assert least["kvikio"] == (least["threads"][0] + 4 * BOUNCE_BUFFER, least["threads"][1])


def test_a_reader_for_a_device_without_one(stores) -> None:  # noqa: F811
    run = RunConfig(io=IoConfig(reader="kvikio"))
    said = r"^--reader kvikio reads to a device.* leave it out, or add --device cuda$"
    with pytest.raises(DeviceError, match=said):
        Model.open(stores["dense"], run=run)
    with pytest.raises(DeviceError, match=said):
        promise(stores["dense"], Cap(), context=None, run=run, remeasure=False, seconds=1.0)


class Pretending(KvikioReader):
    """It is shown the CPU's memory as a device shows its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths, ThreadReader(paths, threads=2), threads=4)

    def submit_to_device(self, file: int, extents: Extents, target: Bytes) -> Any:
        return super().submit_to_device(file, extents, PretendedMemory(target))


@pytest.mark.parametrize("case", ["records", "dense"])
def test_the_whole_way_by_kvikio(stores, monkeypatch: pytest.MonkeyPatch, case: str) -> None:  # noqa: F811
    install(monkeypatch, StandIn())
    cap, run = Cap(weight_memory=LARGE, vram=LARGE), RunConfig(threads=1)
    with opened(stores[case], cap, run, [], Pretending) as model:
        assert "threads of kvikio" in model.reader_note
        assert model.ledger.load.bytes_to_device >= sum(layer.bytes for layer in model.store.manifest.layers)
        found = model.logits(model.session(), PROMPT)
    assert np.array_equal(found, expected(stores[case], run.backend, "cached")[0])
