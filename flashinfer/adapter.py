"""A LoRA adapter and the weight store it is applied to at run time: which role each of its changes belongs to.

The one bridge between the towers: `checkpoint.adapter` reads the files, as for `pack --merge-adapter`, and
`model.adapter` computes with what comes out here. A store names the checkpoint's tensor of each role; which rows of it
where they are not all, in order, the layout says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError, LayoutError
from flashinfer.memory import AdapterNeeds
from flashinfer.quant import codec_named
from flashinfer.store import Facts, Manifest, Store
from flashinfer.store.geometry import round_up
from flashinfer.store.roles import ffn_role, role_shapes

if TYPE_CHECKING:
    from flashinfer.checkpoint.adapter import Adapter, LowRank
    from flashinfer.checkpoint.base import TensorInfo, Words
    from flashinfer.checkpoint.raw import RawFile
    from flashinfer.layout.view import View

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]

HEADS = ("lm_head.weight", "embed_out.weight")
"""What the head is called by models whose stores do not say, because head and embedding are one."""
EXPERTS = (".experts.", ".shared_expert.", ".shared_experts.")
"""In the names of what one expert has for itself; a store knows the first one's only."""
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


@dataclass(frozen=True, eq=False)
class Share:
    """What an adapter changes in the matrix of one role: `rows` of `change`, in that order."""

    change: LowRank
    rows: Index

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.change.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix it is added to, `[out, in]`."""
        return len(self.rows), self.change.a.shape[1]

    @property
    def places(self) -> tuple[int, int]:
        """Bytes that A and B take in memory."""
        a, b = (codec_named(info.dtype).row_bytes(info.shape[1]) for info in (self.change.a, self.change.b))
        return round_up(self.rank * a, PLACE), round_up(len(self.rows) * b, PLACE)


@dataclass(frozen=True)
class StoreAdapter:
    """An adapter that fits a store. Holds no file open.

    identity: XXH3-128 of its files, 32 hex digits. shares: its changes, by the role of the matrix they are added to;
    where head and embedding are one, `embed.weight` is the head.
    """

    path: Path
    identity: str
    facts: Facts
    shares: Mapping[str, Share]

    @property
    def decides(self) -> bool:
        """Whether it changes who fires, given the same input."""
        return any(role.endswith(f".ffn.{self.facts.decision}.weight") for role in self.shares)

    @property
    def needs(self) -> AdapterNeeds:
        """What it takes in memory."""
        f, ranks = self.facts, [share.rank for share in self.shares.values()]
        inner = [share.shape[0] for role, share in self.shares.items() if role not in ("embed.weight", "head.weight")]
        apart = any(_is_neurons(role, f) for role in self.shares)
        return AdapterNeeds(
            bytes=sum(sum(share.places) for share in self.shares.values()),
            values=max([3 * f.intermediate_size if apart else 0, *inner]) + 2 * max(ranks),
            logits=f.vocab_size if len(inner) < len(ranks) else 0,
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
            if set(opened.low_rank.values()) != {share.change for share in self.shares.values()}:
                raise CheckpointError(f"{self.path} was changed while it was being opened; run again")
            yield from self._read(opened.file)
        finally:
            opened.file.close()

    def _read(self, file: RawFile) -> Iterator[tuple[str, Change]]:
        memory, at = np.empty(self.needs.bytes, dtype=np.uint8), 0
        for role, share in self.shares.items():
            c, (first, second) = share.change, share.places
            a = _factor(file, c.a, np.arange(share.rank), memory[at:], transposed=role.endswith(".ffn.down.weight"))
            b = _factor(file, c.b, share.rows, memory[at + first :], transposed=False)
            at += first + second
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
        matching = _Matching(store, opened)
        shares = {role: s for name, c in opened.low_rank.items() for role, s in matching.shares(name, c).items()}
        for name, info in opened.saved.items():
            matching.check_saved(name, info)
        if not shares:
            raise CheckpointError(f"{path} changes no matrix; give an adapter that was trained")
        return StoreAdapter(path, _identity(opened), store.manifest.facts, shares)
    finally:
        opened.file.close()


class _Matching:
    """Names of the model's tensors, as transformers has them, to roles of one store."""

    def __init__(self, store: Store, adapter: Adapter) -> None:
        self._store, self._adapter, self._facts = store, adapter, store.manifest.facts
        self._roles: dict[str, list[str]] = {}
        self._cut: set[str] = set()
        routed = [(i, layer.parts) for i, layer in enumerate(store.manifest.layers) if layer.experts is not None]
        self._of_experts = {ffn_role(i, part.role) for i, parts in routed for part in parts}
        for role, source in _sources(store.manifest):
            name, view, _ = source.partition("#")
            self._roles.setdefault(name, []).append(role)
            if view:
                self._cut.add(role)

    def shares(self, name: str, change: LowRank) -> dict[str, Share]:
        """The change of a tensor of the checkpoint, by the roles that tensor has.

        Raises:
            CheckpointError: it has none that is changed at run time, or the change has not its shape.
        """
        from flashinfer.checkpoint.sum import need_packable

        for info in (change.a, change.b):
            need_packable(info, self._adapter.path)
        roles = self._found(name)
        if any(part in name for part in EXPERTS) or not self._of_experts.isdisjoint(roles):
            raise self._refused(name, f"is one of experts, which is not done at run time; {MERGE}")
        if not roles:
            raise self._refused(name, "the store has not: it is for another model")
        if roles[0].startswith("embed.") and not self._is_tied_head(name):
            raise self._refused(name, f"is an embedding, which is not done at run time; {MERGE}")
        found = {role: Share(change, self._rows(role, name, change)) for role in roles}
        shapes = [role_shapes(self._facts)[role] for role in roles]
        wanted, given = [sum(s[0] for s in shapes), *shapes[0][1:]], [change.b.shape[0], change.a.shape[1]]
        if wanted != given or [share.shape for share in found.values()] != shapes:
            raise self._refused(name, f"is {wanted} there and {given} in the adapter: it is for another model")
        return found

    def _rows(self, role: str, name: str, change: LowRank) -> Index:
        """Which rows of a tensor of the checkpoint are those of a role, in its order."""
        if role not in self._cut:
            return np.arange(change.b.shape[0])
        if role not in self._views:
            raise self._refused(
                name, f"the store holds in parts or turned, in a way this version does not know; {MERGE}"
            )
        return self._views[role].rows

    @cached_property
    def _views(self) -> Mapping[str, View]:
        """How the layout cuts tensors; none where it is not known any more, or says something else than the store."""
        from flashinfer.layout import find_layout, views_of

        entry = self._store.manifest.text.get("config.json")
        if entry is None:
            return {}
        try:
            config = msgspec.json.decode(self._store.read_range(entry, 0, entry.bytes), type=dict[str, Any])
            facts, views = views_of(find_layout(config, self._roles), config, self._roles)
        except (LayoutError, msgspec.MsgspecError):
            return {}
        return views if facts == self._facts else {}

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
            yield ffn_role(i, part.role), part.source


def _is_neurons(role: str, facts: Facts) -> bool:
    """Whether a matrix is read neuron by neuron after the decision, in every store."""
    return role.endswith(".ffn.down.weight") or (facts.gated and role.endswith(".ffn.up.weight"))


def _identity(adapter: Adapter) -> str:
    digest = xxhash.xxh3_128((adapter.path / "adapter_config.json").read_bytes())
    with adapter.file.path.open("rb") as file:
        while piece := file.read(COPY_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _factor(file: RawFile, info: TensorInfo, rows: Index, memory: Bytes, *, transposed: bool) -> Factor:
    """Rows of a tensor of the file in its type, at the start of `memory`; it is read a few rows at a time."""
    cols = info.shape[1]
    step = max(1, COPY_CHUNK // (4 * max(1, cols)))
    size = len(rows) * codec_named(info.dtype).row_bytes(cols)
    stored: Words = memory[:size].view("<u4" if info.dtype == "f32" else "<u2")
    stored = stored.reshape((cols, len(rows)) if transposed else (len(rows), cols))
    whole = stored.T if transposed else stored
    for first in range(0, info.shape[0], step):
        last = min(info.shape[0], first + step)
        words = file.read_rows(info.name, first, last)
        if not np.isfinite(codec_named(info.dtype).decode(words.view(np.uint8))).all():
            raise CheckpointError(f"tensor {info.name} of {file.path} holds NaN or infinity; get it again")
        here = (rows >= first) & (rows < last)
        whole[here] = words[rows[here] - first]
    return Factor(memory[:size], info.dtype, *stored.shape)
