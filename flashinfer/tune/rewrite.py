"""Another arrangement of the weights: decision matrices in or out of the bundles, neurons in another order, matrices in
other codecs.

The bytes of every weight whose codec is kept stay what they are; the result is what `pack` would have written with
these options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.errors import StoreError
from flashinfer.store import FileEntry, Manifest, Store, StoreUpdate, TensorEntry
from flashinfer.store.dense import DensePlan, DenseTensor, plan_dense, write_dense
from flashinfer.store.geometry import round_up
from flashinfer.store.manifest import NO_HASH, PartEntry, encode_manifest
from flashinfer.store.neurons import (
    BundlePart,
    Bytes,
    Chosen,
    PartRole,
    file_size,
    plan_layers,
    record_chunks,
    write_neurons,
)
from flashinfer.store.progress import Meter, Progress
from flashinfer.store.roles import (
    all_roles,
    bundle_parts,
    ffn_role,
    is_outliers,
    is_predictor,
    order_role,
    outliers_role,
    role_shapes,
)
from flashinfer.tune.gather import Source, damaged

Decision = Literal["separate", "bundled"]
Order = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RewritePlan:
    """The draft of the changed store: everything but checksums and the file names made of them.

    `orders` maps the role of each permutation to it; `need` is the room the new files take on disk, in bytes.
    """

    draft: Manifest
    dense: DensePlan
    orders: dict[str, Order]
    need: int


def plan_rewrite(
    old: Manifest,
    *,
    decision: Decision,
    orders: Sequence[npt.ArrayLike | None],
    bundles_per_record: int | Sequence[int] | None = None,
    keep_predictors: bool = False,
    codecs: Mapping[str, str] | None = None,
    outliers: Mapping[str, Sequence[int]] | None = None,
) -> RewritePlan:
    """Decide what `rewrite`, whose arguments these are, will write; codecs and outlier columns are those of its source.
    Pure.

    Raises:
        StoreError: an option that cannot be.
    """
    facts = old.facts
    permutations = _orders(orders, facts.num_layers, facts.intermediate_size)
    counts = _counts(bundles_per_record, facts.num_layers, facts.intermediate_size)
    codecs = codecs or {}
    weights = [
        {part: replace(p, codec=codecs.get(ffn_role(i, part), p.codec)) for part, p in layer_weights(old, i).items()}
        for i in range(facts.num_layers)
    ]
    layers = plan_layers(
        facts,
        [[w[role] for role in bundle_parts(facts, decision, set(w))] for w in weights],
        decision=decision,
        bundles_per_record=counts,
        alignment=old.alignment,
        permuted=permutations,
    )
    bundled = {ffn_role(i, p.role) for i, layer in enumerate(layers) for p in layer.parts}
    dense = plan_dense(_dense_tensors(old, weights, permutations, bundled, codecs, outliers or {}))
    kept = {role: t for role, t in old.tensors.items() if keep_predictors and is_predictor(role)}
    if decision == "separate" and any(".sketch." in role for role in kept):
        raise StoreError("a sketch belongs to a decision matrix in the bundles; it cannot be kept without that")
    draft = msgspec.structs.replace(
        old,
        dense=FileEntry(f"dense-{NO_HASH[:16]}.safetensors", dense.bytes, NO_HASH),
        neurons=FileEntry(f"neurons-{NO_HASH[:16]}.bin", file_size(layers), NO_HASH),
        tensors=dense.entries | kept,
        layers=layers,
        sections=old.sections if keep_predictors else {},
        predictors=old.predictors if keep_predictors else None,
    )
    sizes = (draft.dense.bytes, draft.neurons.bytes, len(encode_manifest(draft)))
    return RewritePlan(draft, dense, permutations, sum(round_up(size, FILE_ALIGNMENT) for size in sizes))


def rewrite(
    store: Store,
    update: StoreUpdate,
    *,
    decision: Decision,
    orders: Sequence[npt.ArrayLike | None],
    bundles_per_record: int | Sequence[int] | None = None,
    keep_predictors: bool = False,
    source: Source | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the weights of `store` anew through `update`; the manifest that names the new files, to be committed.

    Peak memory is a constant (a few times `config.PACK_BLOCK`), whatever the model's size. The old weights are
    checked on the way: damage never gets a checksum of its own.

    Args:
        store: what the update was opened with.
        update: mutated: two data files are created.
        decision: where the decision matrices go.
        orders: per layer, the original neuron at each position; None is the original order.
        bundles_per_record: of all layers, or per layer; None chooses it as `pack` does.
        keep_predictors: whether predictors and sections stay in the manifest. None of them depends on the order, but
            statistics of what was read do.
        source: where the bytes come from; one whose weights have other codecs (`recode.Recoded`) changes them so.
        progress: called with bytes written and bytes in all.

    Raises:
        StoreError: an option that cannot be, or damage in the old files.
        DiskFullError: no room.
    """
    source = source or Source(store)
    plan = plan_rewrite(
        store.manifest,
        decision=decision,
        orders=orders,
        bundles_per_record=bundles_per_record,
        keep_predictors=keep_predictors,
        codecs=source.codecs,
        outliers=source.outliers,
    )
    total = sum(t.bytes for t in plan.dense.entries.values()) + sum(n.bytes for n in plan.draft.layers)
    meter = Meter(total, progress)
    with source:
        with update.create("dense", ".safetensors") as file:
            tensors = write_dense(file, plan.dense, lambda role: meter(_dense_chunks(source, plan, role)))
        _check_copies(store, tensors)
        with update.create("neurons", ".bin") as file:
            layers = write_neurons(file, plan.draft.layers, lambda i: meter(_layer_chunks(source, plan, i)))
    dense, neurons = update.entries[-2:]
    return msgspec.structs.replace(
        plan.draft, dense=dense, neurons=neurons, tensors=plan.draft.tensors | tensors, layers=layers
    )


def _dense_chunks(source: Source, plan: RewritePlan, role: str) -> Iterator[memoryview]:
    """The bytes of a tensor of the new dense file."""
    if role in plan.orders:
        yield plan.orders[role].data.cast("B")
    elif role in source.outliers:
        yield np.array(source.outliers[role], dtype="<i4").data.cast("B")
    elif role in source.manifest.tensors:
        yield from source.tensor_chunks(role)
    else:
        _, layer, _, part = role.split(".", 3)
        for block in source.blocks(int(layer), [part]):
            yield np.ascontiguousarray(block[part]).data.cast("B")


def _layer_chunks(source: Source, plan: RewritePlan, layer: int) -> Iterator[memoryview]:
    """The records of a layer of the new neuron file."""
    entry = plan.draft.layers[layer]
    wanted = [part.role for part in entry.parts]

    def parts_of(chosen: Chosen) -> Iterable[tuple[PartEntry, Bytes]]:
        found = source.parts(layer, chosen, wanted)
        return [(part, found[part.role]) for part in entry.parts]

    return record_chunks(entry, plan.orders[entry.permutation] if entry.permutation else None, parts_of)


def _check_copies(store: Store, tensors: dict[str, TensorEntry]) -> None:
    """What was copied as it is has the checksum it had."""
    for role, t in tensors.items():
        old = store.manifest.tensors.get(role)
        if old is None or old.codec != t.codec or role.endswith(".ffn.order"):
            continue
        if old.xxh3 != t.xxh3:
            raise damaged(f"tensor {role}", store.path_of(store.manifest.dense))


def layer_weights(old: Manifest, layer: int) -> dict[str, BundlePart]:
    """What is stored of every neuron of a layer, by part, wherever it lies."""
    found: dict[str, BundlePart] = {
        p.role: BundlePart(p.role, p.codec, p.elements, p.source) for p in old.layers[layer].parts
    }
    dense: tuple[PartRole, ...] = ("gate.weight", "gate.bias", "up.weight", "up.bias")
    for part in dense:
        if (t := old.tensors.get(ffn_role(layer, part))) is not None:
            found[part] = BundlePart(part, t.codec, t.shape[1] if len(t.shape) == 2 else 1, t.source)
    return found


def _dense_tensors(
    old: Manifest,
    weights: Sequence[dict[str, BundlePart]],
    orders: dict[str, Order],
    bundled: set[str],
    changed: Mapping[str, str],
    outliers: Mapping[str, Sequence[int]],
) -> list[DenseTensor]:
    """What the new dense file holds, in the order a token uses them."""
    counts = {role: t.shape[0] for role, t in old.tensors.items() if is_outliers(role)}
    counts |= {role: len(columns) for role, columns in outliers.items()}
    codecs = {
        role: (changed.get(role, t.codec), t.source)
        for role, t in old.tensors.items()
        if t.file == "dense" and t.codec != "i32"
    }
    for i, parts in enumerate(weights):
        codecs |= {ffn_role(i, role): (p.codec, p.source) for role, p in parts.items() if role != "down.weight"}
    tensors = []
    shapes = role_shapes(old.facts)
    for role in all_roles(old.facts):
        if role in orders:
            tensors.append(DenseTensor(role, "i32", orders[role].shape, ""))
        elif role in counts:
            tensors.append(DenseTensor(role, "i32", (counts[role],), ""))
        elif role in codecs and role not in bundled:
            codec, source = codecs[role]
            tensors.append(DenseTensor(role, codec, shapes[role], source, counts.get(outliers_role(role) or "", 0)))
    return tensors


def _orders(orders: Sequence[npt.ArrayLike | None], layers: int, neurons: int) -> dict[str, Order]:
    """The permutations there are, by role."""
    if len(orders) != layers:
        raise StoreError(f"{len(orders)} orders for {layers} layers")
    found = {}
    for i, given in enumerate(orders):
        if given is not None:
            order = np.asarray(given)
            if order.shape != (neurons,) or not np.array_equal(np.sort(order), np.arange(neurons)):
                raise StoreError(f"the order of layer {i} does not name each neuron once")
            found[order_role(i)] = order.astype("<i4")
    return found


def _counts(given: int | Sequence[int] | None, layers: int, neurons: int) -> list[int | None]:
    """Bundles per record of each layer; None: to be chosen."""
    counts: list[int | None] = [given] * layers if given is None or isinstance(given, int) else list(given)
    if len(counts) != layers:
        raise StoreError(f"{len(counts)} counts of bundles per record for {layers} layers")
    for count in counts:
        if count is not None and not 1 <= count <= neurons:
            raise StoreError(f"bundles per record {count} is not from 1 to {neurons}, the neurons")
    return counts
