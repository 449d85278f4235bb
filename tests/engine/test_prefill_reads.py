"""A chunk of a prompt reads nothing twice: no record, no block of a dense matrix, no row of a table."""

from __future__ import annotations

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
from tests.checkpoints import make_llama, make_opt

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
    """Remembers what was read: file, first byte, byte after the last."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__([path.read_bytes() for path in paths])
        self.read: list[tuple[int, int, int]] = []

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
    model, reader = open_at(stores[name], share, objective, monkeypatch)
    with model:
        tensors = model.store.manifest.tensors
        streamed = {r for r, t in tensors.items() if len(t.shape) == 2} - model.plan.resident
        forward, starts = model._decoder.forward, []

        def noted(*arguments: Any) -> Any:
            starts.append(len(reader.read))
            return forward(*arguments)

        monkeypatch.setattr(model._decoder, "forward", noted)
        reader.read.clear()
        model.step(model.session(), PROMPT)
        account, size = model.ledger.prefill, model.store.manifest.weight_bytes()
        assert account.bytes_read <= CHUNKS * size + 2 * reader.alignment * account.reads
        assert len(starts) == CHUNKS
        for begin, end in pairwise([*starts, len(reader.read)]):
            assert times_read(reader, 1, reader.read[begin:end]).max(initial=0) <= 1
        times = times_read(reader, 0, reader.read)
        prefetched = min((tensors[r].offset for r in streamed if r.startswith(("layers.", "project_in"))), default=-1)
        for role, t in tensors.items():
            most = 1 if role in ("head.weight", "project_out.weight") else CHUNKS
            if t.offset == prefetched or (role == "embed.weight" and "head.weight" not in tensors):
                most += 1  # what the next step starts with; the head
            here = times[t.offset // reader.alignment : (t.offset + t.bytes) // reader.alignment]
            assert here.max(initial=0) <= most, role


def times_read(reader: Recorder, file: int, reads: list[tuple[int, int, int]]) -> np.ndarray:
    """How often each unit of the file was read, not counting the ends of reads, where widened neighbours meet."""
    unit = reader.alignment
    times = np.zeros(len(reader.blobs[file]) // unit + 1, dtype=int)
    for _, start, end in (read for read in reads if read[0] == file):
        times[start // unit + 1 : end // unit - 1] += 1
    return times
