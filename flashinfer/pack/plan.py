"""What `pack` will write, decided before a byte is: a draft manifest with exact sizes and no checksums. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from flashinfer import __distribution__, __version__
from flashinfer.checkpoint import Checkpoint
from flashinfer.checkpoint.base import Coded
from flashinfer.config import FILE_ALIGNMENT
from flashinfer.errors import CheckpointError
from flashinfer.layout import Match
from flashinfer.pack.recipe import Recipe
from flashinfer.quant import PLAIN
from flashinfer.store.dense import DensePlan, DenseTensor, plan_dense
from flashinfer.store.facts import Experts, Facts
from flashinfer.store.geometry import round_up
from flashinfer.store.manifest import (
    FORMAT,
    NO_HASH,
    VERSION,
    FileEntry,
    Manifest,
    NeuronLayer,
    Origin,
    encode_manifest,
)
from flashinfer.store.neurons import BundlePart, PartRole, file_size, plan_layers
from flashinfer.store.roles import all_roles, bundle_parts, ffn_role, order_role, role_shapes

Decision = Literal["separate", "bundled"]
Order = npt.NDArray[np.int32]

SOURCES = frozenset(c.name for c in PLAIN)
"""Types of a checkpoint's tensors that can be packed."""


@dataclass(frozen=True)
class PackOptions:
    """How to pack; see `pack` for each."""

    quant: Recipe
    decision: Decision
    alignment: int
    bundles_per_record: int | None
    permutation: Sequence[npt.ArrayLike] | None


@dataclass(frozen=True)
class PackPlan:
    """The draft of a store: everything but checksums and the file names made of them.

    `orders` maps the role of each permutation to it; `need` is the room the store takes on disk, in bytes.
    """

    match: Match
    draft: Manifest
    dense: DensePlan
    orders: dict[str, Order]
    need: int

    @property
    def data_bytes(self) -> int:
        """Bytes that carry data: tensors, records and text; headers and padding between them left out."""
        m = self.draft
        text = sum(f.bytes for f in m.text.values())
        return sum(t.bytes for t in m.tensors.values()) + sum(n.bytes for n in m.layers) + text


def plan_pack(source: Checkpoint, match: Match, options: PackOptions) -> PackPlan:
    """Decide codecs, geometry and places. Raises CheckpointError for an option or a dtype that cannot be."""
    _check_options(options, match)
    orders = _orders(options.permutation, match.facts)
    layers = _plan_layers(source, match, options, orders)
    bundled = {ffn_role(i, p.role): p.codec for i, layer in enumerate(layers) for p in layer.parts}
    dense = plan_dense(_dense_tensors(source, match, options, orders, bundled.keys()))
    codecs = bundled | {role: t.codec for role, t in dense.entries.items()}
    draft = Manifest(
        format=FORMAT,
        version=VERSION,
        generator=f"{__distribution__} {__version__}",
        alignment=options.alignment,
        facts=match.facts,
        dense=_draft_file("dense-", ".safetensors", dense.bytes),
        neurons=_draft_file("neurons-", ".bin", file_size(layers)),
        tensors=dense.entries,
        layers=layers,
        text={n: _draft_file("text-", f"-{n}", path.stat().st_size) for n, path in source.text.items()},
        origins=_origins(source, match.sources, codecs),
    )
    sizes = [f.bytes for f in draft.files()] + [len(encode_manifest(draft))]
    return PackPlan(match, draft, dense, orders, sum(round_up(size, FILE_ALIGNMENT) for size in sizes))


def _check_options(options: PackOptions, match: Match) -> None:
    facts = match.facts
    matrices = [role for role, shape in role_shapes(facts).items() if len(shape) == 2 and role in match.sources]
    if unused := options.quant.unused(matrices, facts):
        raise CheckpointError(f"quant names {', '.join(unused)}, which fits no matrix of this model; take it out")
    a, count = options.alignment, options.bundles_per_record
    if not 512 <= a <= FILE_ALIGNMENT or a & (a - 1):
        raise CheckpointError(f"alignment {a} is not a power of two from 512 to {FILE_ALIGNMENT}")
    if facts.experts is not None:
        _check_expert_options(options, facts.experts)
    elif count is not None and not 1 <= count <= facts.intermediate_size:
        raise CheckpointError(f"bundles per record {count} is not from 1 to {facts.intermediate_size}, the neurons")


def _check_expert_options(options: PackOptions, experts: Experts) -> None:
    count, whole = options.bundles_per_record, math.gcd(experts.size, experts.shared_size)
    if options.permutation is not None:
        raise CheckpointError("neurons of experts stay in their order; leave the permutation out")
    if count is not None and (count < 1 or whole % count):
        raise CheckpointError(f"bundles per record {count} does not divide {whole}, the neurons of an expert")


def _orders(permutation: Sequence[npt.ArrayLike] | None, facts: Facts) -> dict[str, Order]:
    if permutation is None:
        return {}
    if len(permutation) != facts.num_layers:
        raise CheckpointError(f"{len(permutation)} permutations for {facts.num_layers} layers")
    identity = np.arange(facts.intermediate_size)
    orders = {}
    for i, given in enumerate(permutation):
        order = np.asarray(given)
        if order.shape != identity.shape or not np.array_equal(np.sort(order), identity):
            raise CheckpointError(f"the permutation of layer {i} does not name each neuron once")
        orders[order_role(i)] = order.astype("<i4")
    return orders


def _codec(source: Checkpoint, role: str, name: str, asked: str | None) -> str:
    """Codec of a tensor: vectors are f32; matrices as asked, or as they are. One that comes quantised keeps its codes
    where it can, and else gets the nearest codec."""
    info = source.tensors[name]
    if info.dtype not in SOURCES:
        raise CheckpointError(
            f"tensor {name} is {info.dtype}; F32, F16 and BF16 can be packed: convert the checkpoint to one of them"
        )
    if len(info.shape) == 1:
        return "f32"
    if info.coded is None or asked is not None:
        return asked or info.dtype
    return _held(info.coded, role) or info.coded.nearest


def _held(coded: Coded, role: str) -> str | None:
    """The codec that keeps the codes of a matrix of that role; None for down, whose rows here are its columns there."""
    return None if role.endswith(".down.weight") else coded.codec


def _origins(source: Checkpoint, sources: Mapping[str, str], codecs: Mapping[str, str]) -> dict[str, Origin]:
    """What every matrix that comes quantised was, by role."""
    found = {}
    for role, name in sources.items():
        coded = source.tensors[name].coded
        if coded is not None:
            found[role] = Origin(coded.scheme, kept=codecs[role] == _held(coded, role))
    return found


def _dense_tensors(
    source: Checkpoint, match: Match, options: PackOptions, orders: dict[str, Order], bundled: Set[str]
) -> list[DenseTensor]:
    """In the order a token uses them."""
    tensors = []
    shapes = role_shapes(match.facts)
    for role in all_roles(match.facts):
        name = match.sources.get(role)
        if role in orders:
            tensors.append(DenseTensor(role, "i32", orders[role].shape, ""))
        elif name is not None and role not in bundled:
            tensors.append(
                DenseTensor(
                    role, _codec(source, role, name, options.quant.codec(role, match.facts)), shapes[role], name
                )
            )
    return tensors


def _plan_layers(
    source: Checkpoint, match: Match, options: PackOptions, orders: dict[str, Order]
) -> tuple[NeuronLayer, ...]:
    facts = match.facts
    decision: Decision = "bundled" if facts.experts is not None else options.decision
    parts = []
    for i in range(facts.num_layers):
        biases = {b for b in ("gate.bias", "up.bias") if ffn_role(i, b) in match.sources}
        sources = {role: match.sources[ffn_role(i, role)] for role in bundle_parts(facts, decision, biases)}
        parts.append(
            [
                BundlePart(
                    cast(PartRole, role),
                    _codec(source, ffn_role(i, role), name, options.quant.codec(ffn_role(i, role), facts)),
                    1 if role.endswith(".bias") else facts.hidden_size,
                    name,
                )
                for role, name in sources.items()
            ]
        )
    return plan_layers(
        facts,
        parts,
        decision=decision,
        bundles_per_record=[options.bundles_per_record] * facts.num_layers,
        alignment=options.alignment,
        permuted=orders,
    )


def _draft_file(stem: str, suffix: str, size: int) -> FileEntry:
    return FileEntry(f"{stem}{NO_HASH[:16]}{suffix}", size, NO_HASH)
