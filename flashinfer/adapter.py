"""A LoRA adapter and the weight store it is applied to at run time: which role each of its changes belongs to.

The one bridge between the towers: `checkpoint.adapter` reads the files, as for `pack --merge-adapter`, and
`model.adapter` computes with what comes out here. A store names the checkpoint's tensor of each role, so no layout is
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError
from flashinfer.memory import AdapterNeeds
from flashinfer.quant import codec_named
from flashinfer.store import Facts, Manifest, Store
from flashinfer.store.geometry import round_up
from flashinfer.store.roles import role_shapes

if TYPE_CHECKING:
    from flashinfer.checkpoint.adapter import Adapter, LowRank
    from flashinfer.checkpoint.base import TensorInfo, Words
    from flashinfer.checkpoint.raw import RawFile

Bytes = npt.NDArray[np.uint8]

HEADS = ("lm_head.weight", "embed_out.weight")
"""What the head is called by models whose stores do not say, because head and embedding are one."""
PLACE = 64
"""Bytes each factor's place in memory is a multiple of."""
MERGE = "merge it with `flashinfer pack CHECKPOINT STORE --merge-adapter DIR`"


@dataclass(frozen=True)
class Factor:
    """A thin matrix `[rows, cols]`, in the bytes of its codec."""

    raw: Bytes
    codec: str
    rows: int
    cols: int


@dataclass(frozen=True)
class Change:
    """`scale * B A`, added to one matrix: `a` `[rank, in]` (of `down` transposed: a row for each neuron), `b`
    `[out, rank]`."""

    a: Factor
    b: Factor
    scale: float


@dataclass(frozen=True)
class StoreAdapter:
    """An adapter that fits a store. Holds no file open.

    identity: XXH3-128 of its files, 32 hex digits. low_rank: its changes, by the role of the matrix they are added to;
    where head and embedding are one, `embed.weight` is the head.
    """

    path: Path
    identity: str
    facts: Facts
    low_rank: Mapping[str, LowRank]

    @property
    def decides(self) -> bool:
        """Whether it changes who fires, given the same input."""
        return any(role.endswith(f".ffn.{self.facts.decision}.weight") for role in self.low_rank)

    @property
    def needs(self) -> AdapterNeeds:
        """What it takes in memory."""
        f, ranks = self.facts, [c.a.shape[0] for c in self.low_rank.values()]
        layers = [c.b.shape[0] for role, c in self.low_rank.items() if role.startswith("layers.")]
        apart = any(_is_neurons(role, f) for role in self.low_rank)
        return AdapterNeeds(
            bytes=sum(_place_bytes(info) for c in self.low_rank.values() for info in (c.a, c.b)),
            values=max([3 * f.intermediate_size if apart else 0, *layers]) + 2 * max(ranks),
            logits=f.vocab_size if len(layers) < len(ranks) else 0,
            rank=max(ranks),
        )

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Role and values of each change, all in one piece of memory of `needs.bytes`.

        Raises:
            CheckpointError: a value is NaN or infinite, or the files were cut or changed since they were matched.
        """
        from flashinfer.checkpoint.adapter import open_adapter

        opened = open_adapter(self.path)
        try:
            if set(opened.low_rank.values()) != set(self.low_rank.values()):
                raise CheckpointError(f"{self.path} was changed while it was being opened; run again")
            yield from self._read(opened.file)
        finally:
            opened.file.close()

    def _read(self, file: RawFile) -> Iterator[tuple[str, Change]]:
        memory, at = np.empty(self.needs.bytes, dtype=np.uint8), 0
        for role, c in self.low_rank.items():
            a = _factor(file, c.a, memory[at:], transposed=role.endswith(".ffn.down.weight"))
            at += _place_bytes(c.a)
            b = _factor(file, c.b, memory[at:], transposed=False)
            at += _place_bytes(c.b)
            yield role, Change(a, b, c.scale)


def read_adapter(path: Path, store: Store) -> StoreAdapter:
    """The adapter directory at `path`, matched with a store: every change has a role, and the shape of it.

    Raises:
        CheckpointError: there is no adapter, it was made for another model, or it asks for more than a run can do:
            says what, and whether merging it can.
    """
    from flashinfer.checkpoint.adapter import open_adapter

    opened = open_adapter(path)
    try:
        matched = _Matching(store, opened)
        low_rank = {matched.role(name): change for name, change in opened.low_rank.items()}
        for name, info in opened.saved.items():
            matched.check_saved(name, info)
        for role, change in low_rank.items():
            matched.check(role, change)
        return StoreAdapter(path, _identity(opened), store.manifest.facts, low_rank)
    finally:
        opened.file.close()


class _Matching:
    """Names of the model's tensors, as transformers has them, to roles of one store."""

    def __init__(self, store: Store, adapter: Adapter) -> None:
        self._store, self._adapter, self._facts = store, adapter, store.manifest.facts
        self._roles: dict[str, list[str]] = {}
        self._cut: set[str] = set()
        for role, source in _sources(store.manifest):
            name, view, _ = source.partition("#")
            self._roles.setdefault(name, []).append(role)
            if view:
                self._cut.add(name)

    def role(self, name: str) -> str:
        """The role of the one matrix that is that tensor of the checkpoint."""
        if ".experts." in name:
            raise self._refused(name, f"is one of an expert, which is not done at run time; {MERGE}")
        roles = self._found(name)
        if not roles:
            raise self._refused(name, "the store has not: it is for another model")
        turned = any(role.endswith(("attn.q.weight", "attn.k.weight")) for role in roles)
        if len(roles) > 1 or (name in self._cut and turned):
            raise self._refused(name, f"the store holds cut in parts or in another order; {MERGE}")
        if roles[0].startswith("embed.") and not self._is_tied_head(name):
            raise self._refused(name, f"is an embedding, which is not done at run time; {MERGE}")
        return roles[0]

    def check(self, role: str, change: LowRank) -> None:
        """Raise CheckpointError where a change has not the shape of its matrix, or a type that is not read."""
        from flashinfer.checkpoint.sum import need_packable

        wanted, found = role_shapes(self._facts)[role], (change.b.shape[0], change.a.shape[1])
        if found != wanted:
            raise self._refused(
                change.a.name, f"is for a matrix {list(found)}, the store has {list(wanted)}: it is for another model"
            )
        for info in (change.a, change.b):
            need_packable(info, self._adapter.path)

    def check_saved(self, name: str, info: TensorInfo) -> None:
        """Accept whole tensors that peft saved beside what it trained: those of embedding and head, of the same shape
        (`save_embedding_layers`). Raises CheckpointError for all others."""
        roles = self._found(name)
        beside = bool(roles) and roles[0] in ("embed.weight", "head.weight") and not self._adapter.config.trains(name)
        if not beside or role_shapes(self._facts)[roles[0]] != info.shape:
            raise self._refused(name, f"is replaced as a whole, which is not done at run time; {MERGE}")

    def _found(self, name: str) -> list[str]:
        """Older checkpoints lack the first `model.`."""
        for candidate in (name, name.removeprefix("model."), f"model.{name}"):
            if candidate in self._roles:
                return self._roles[candidate]
        return ["embed.weight"] if self._is_tied_head(name) else []

    def _is_tied_head(self, name: str) -> bool:
        return self._facts.tied_head and name in HEADS

    def _refused(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._adapter.path} cannot be applied to {self._store.root}: it changes {name[:200]}, which {why}"
        )


def _sources(m: Manifest) -> Iterator[tuple[str, str]]:
    """Role and checkpoint name of everything that has one."""
    for role, tensor in m.tensors.items():
        if tensor.source:
            yield role, tensor.source
    for i, layer in enumerate(m.layers):
        for part in layer.parts:
            yield f"layers.{i}.ffn.{part.role}", part.source


def _is_neurons(role: str, facts: Facts) -> bool:
    """Whether a matrix is read neuron by neuron after the decision, in every store."""
    return role.endswith(".ffn.down.weight") or (facts.gated and role.endswith(".ffn.up.weight"))


def _place_bytes(info: TensorInfo) -> int:
    return round_up(info.shape[0] * codec_named(info.dtype).row_bytes(info.shape[1]), PLACE)


def _identity(adapter: Adapter) -> str:
    digest = xxhash.xxh3_128((adapter.path / "adapter_config.json").read_bytes())
    with adapter.file.path.open("rb") as file:
        while piece := file.read(COPY_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _factor(file: RawFile, info: TensorInfo, memory: Bytes, *, transposed: bool) -> Factor:
    """A tensor of the file in its type, at the start of `memory`, a few rows of it at a time."""
    rows, cols = info.shape
    step = max(1, COPY_CHUNK // (4 * max(1, cols)))
    size = rows * codec_named(info.dtype).row_bytes(cols)
    whole: Words = memory[:size].view("<u4" if info.dtype == "f32" else "<u2")
    whole = whole.reshape((cols, rows) if transposed else (rows, cols))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        words = file.read_rows(info.name, first, last)
        if not np.isfinite(codec_named(info.dtype).decode(words.view(np.uint8))).all():
            raise CheckpointError(f"tensor {info.name} of {file.path} holds NaN or infinity; get it again")
        if transposed:
            whole[:, first:last] = words.T
        else:
            whole[first:last] = words
    return Factor(memory[:size], info.dtype, *whole.shape)
