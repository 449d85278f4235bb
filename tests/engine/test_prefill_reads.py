"""A chunk of a prompt reads nothing twice: no record, no block of a dense matrix, no row of a table."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer import engine, pack
from flashinfer.config import Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.io import Extents, MemoryReader
from flashinfer.model.stream import Key, Piece
from flashinfer.speed import TABLES
from tests.checkpoints import make_llama, make_opt

Read = tuple[int, int, int]
"""File, first byte, byte after the last."""
CHUNK, CHUNKS = 40, 3
PROMPT = [int(t) for t in np.random.default_rng(2).integers(3, 90, CHUNK * CHUNKS)]
WIDE = {"hidden_size": 512, "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 256}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (make_llama, WIDE | {"intermediate_size": 400, "hidden_act": "relu"}),
    "relu-tied": (make_llama, WIDE | {"intermediate_size": 400, "hidden_act": "relu", "tie_word_embeddings": True}),
    "silu": (make_llama, WIDE | {"intermediate_size": 400, "hidden_act": "silu"}),
    "opt-projections": (make_opt, {
        "ffn_dim": 400, "do_layer_norm_before": False, "word_embed_proj_dim": 32, "max_position_embeddings": 256}),
}  # fmt: skip


class Recorder(MemoryReader):
    """Remembers what was read."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__([path.read_bytes() for path in paths])
        self.read: list[Read] = []

    def submit(self, file: int, extents: Extents, target: Any) -> Any:
        ends = extents.offsets + extents.lengths
        self.read += [(file, a, b) for a, b in zip(extents.offsets.tolist(), ends.tolist(), strict=True)]
        return super().submit(file, extents, target)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for name, (make, config) in SHAPES.items():
        root = tmp_path_factory.mktemp(name)
        pack(make(root / "checkpoint", dtype="float32", **config), root / "store")
        out[name] = root / "store"
    return out


def open_at(store: Path, share: float, objective: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Recorder]:
    """At that share of the way from the floor to everything, with the smallest chunks and read buffers."""
    readers: list[Recorder] = []

    def recorded(paths: list[Path], _: IoConfig) -> Recorder:
        readers.append(Recorder(paths))
        return readers[-1]

    monkeypatch.setattr(engine, "open_reader", recorded)
    run = RunConfig(io=IoConfig(objective=objective), prefill_chunk=CHUNK, staging=64 * 1024, threads=1)
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1), context=192, run=run)
    with Model.open(store, context=192, run=run) as model:
        everything = model.plan.weight_total
    cap = int(e.value.floor + share * (everything - e.value.floor))
    return Model.open(store, Cap(weight_memory=cap), context=192, run=run), readers[-1]


@pytest.mark.parametrize("objective", ["time", "bytes"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("name", SHAPES)
def test_once_per_chunk(stores, monkeypatch, name: str, share: float, objective: str) -> None:
    """What is streamed is used once per chunk, the head once per prompt, and read as often as it is used; beyond that
    only what the next token starts with, as much of it as the ring holds. Nothing else is read but rows and misses."""
    model, reader = open_at(stores[name], share, objective, monkeypatch)
    with model:
        tensors, stream = model.store.manifest.tensors, model._weights._stream
        forward, take = model._decoder.forward, stream.take
        starts: list[int] = []
        taken: list[list[Key]] = []

        def noted(*arguments: Any) -> Any:
            starts.append(len(reader.read))
            taken.append([])
            return forward(*arguments)

        def noted_take(key: Key) -> int:
            taken[-1].append(key)
            return take(key)

        monkeypatch.setattr(model._decoder, "forward", noted)
        monkeypatch.setattr(stream, "take", noted_take)
        reader.read.clear()
        model.step(model.session(), PROMPT)
        account, size = model.ledger.prefill, model.store.manifest.weight_bytes()
        assert account.bytes_read <= CHUNKS * size + model.plan.ring + 2 * reader.alignment * account.reads
        assert len(starts) == CHUNKS
        layers = [piece.key for piece in stream._pieces if not piece.logits]
        head = [piece.key for piece in stream._pieces if piece.logits]
        assert taken == [*[layers] * (CHUNKS - 1), layers + head]
        ahead = [stream._pieces[place.index] for place in stream._ahead]
        assert [piece.key for piece in ahead] == [piece.key for piece in stream._pieces[: len(ahead)]]
        assert sum(piece.extents.total for piece in ahead) <= model.plan.ring
        streamed: Counter[Read] = Counter()
        by_key = {piece.key: piece for piece in stream._pieces}
        for piece in [*(by_key[key] for keys in taken for key in keys), *ahead]:
            streamed.update(reads_of(piece))
        assert not streamed - Counter(reader.read)
        for begin, end in pairwise([*starts, len(reader.read)]):
            missed = [read for read in reader.read[begin:end] if read not in streamed]
            assert times_read(reader, 1, missed).max(initial=0) <= 1
            assert times_read(reader, 0, missed).max(initial=0) <= 1
        others = list((Counter(reader.read) - streamed).elements())
        assert all(read not in streamed for read in others)
        tables = [t for role, t in tensors.items() if role in TABLES and role not in model.plan.resident]
        assert model.facts.sparse or all(file == 0 for file, _, _ in others)
        for start, end in (read[1:] for read in others if read[0] == 0):
            assert any(
                t.offset - reader.alignment < start and end < t.offset + t.bytes + reader.alignment for t in tables
            )


def reads_of(piece: Piece) -> list[Read]:
    offsets, lengths = piece.extents.offsets.tolist(), piece.extents.lengths.tolist()
    return [(piece.reads._file, a, a + n) for a, n in zip(offsets, lengths, strict=True)]


def times_read(reader: Recorder, file: int, reads: list[Read]) -> np.ndarray:
    """How often each unit of the file was read, not counting the ends of reads, where widened neighbours meet."""
    unit = reader.alignment
    times = np.zeros(len(reader.blobs[file]) // unit + 1, dtype=int)
    for _, start, end in (read for read in reads if read[0] == file):
        times[start // unit + 1 : end // unit - 1] += 1
    return times
