"""The neuron file: where each layer's records lie, planned first, then written front to back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.config import FILE_ALIGNMENT, PACK_BLOCK
from flashinfer.quant import codec_named
from flashinfer.store.facts import Experts, Facts
from flashinfer.store.files import HashedFile
from flashinfer.store.geometry import (
    ASSUMED_DENSITY,
    choose_bundles_per_record,
    expert_bundles_per_record,
    expert_records,
    round_up,
)
from flashinfer.store.manifest import NO_HASH, NeuronLayer, PartEntry
from flashinfer.store.roles import order_role

Bytes = npt.NDArray[np.uint8]
Chosen = slice | npt.NDArray[np.int64]
"""Some neurons of a layer, by original index, in the order in which they are stored."""
PartRole = Literal["gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight"]


@dataclass(frozen=True)
class BundlePart:
    """One part of every bundle of a layer: `elements` values of the checkpoint's tensor `source`."""

    role: PartRole
    codec: str
    elements: int
    source: str


def place_parts(parts: Sequence[BundlePart]) -> tuple[PartEntry, ...]:
    """Offsets of the parts in a bundle: one after the other, without gaps."""
    entries = []
    end = 0
    for p in parts:
        entries.append(PartEntry(p.role, p.codec, p.elements, end, p.source))
        end += codec_named(p.codec).row_bytes(p.elements)
    return tuple(entries)


def bundle_size(parts: Sequence[PartEntry]) -> int:
    """Bytes of one bundle."""
    last = parts[-1]
    return last.offset + codec_named(last.codec).row_bytes(last.elements)


def plan_layer(
    parts: tuple[PartEntry, ...],
    *,
    neurons: int,
    decision: Literal["separate", "bundled"],
    bundles_per_record: int,
    alignment: int,
    offset: int,
    permutation: str | None = None,
    experts: Experts | None = None,
) -> NeuronLayer:
    """One layer's region at `offset`, which is a multiple of 4096. Its checksum is still `NO_HASH`.

    Records of experts are whole units of any device, so that nothing is read beside them.
    """
    bundle_bytes = bundle_size(parts)
    record_bytes = round_up(bundles_per_record * bundle_bytes, alignment if experts is None else FILE_ALIGNMENT)
    records = -(-neurons // bundles_per_record)
    return NeuronLayer(
        neurons=neurons,
        decision=decision,
        parts=parts,
        bundle_bytes=bundle_bytes,
        bundles_per_record=bundles_per_record,
        record_bytes=record_bytes,
        records=records,
        offset=offset,
        bytes=records * record_bytes,
        xxh3=NO_HASH,
        permutation=permutation,
        experts=None if experts is None else expert_records(experts, bundles_per_record),
    )


def plan_layers(
    facts: Facts,
    parts: Sequence[Sequence[BundlePart]],
    *,
    decision: Literal["separate", "bundled"],
    bundles_per_record: Sequence[int | None],
    alignment: int,
    permuted: Container[str],
) -> tuple[NeuronLayer, ...]:
    """All layers' regions, one after the other; `parts` and `bundles_per_record` are by layer.

    bundles_per_record: None chooses it from bundle size and alignment. permuted: roles of the permutations there are.
    """
    layers: list[NeuronLayer] = []
    for i, (given, count) in enumerate(zip(parts, bundles_per_record, strict=True)):
        placed = place_parts(given)
        layers.append(
            plan_layer(
                placed,
                neurons=facts.neurons(i),
                decision=decision,
                bundles_per_record=count or _bundles_per_record(facts, i, bundle_size(placed), alignment),
                alignment=alignment,
                offset=file_size(layers),
                permutation=order_role(i) if order_role(i) in permuted else None,
                experts=facts.routed(i),
            )
        )
    return tuple(layers)


def _bundles_per_record(facts: Facts, layer: int, bundle_bytes: int, alignment: int) -> int:
    experts = facts.routed(layer)
    if experts is not None:
        return expert_bundles_per_record(bundle_bytes, experts)
    density = ASSUMED_DENSITY if facts.sparse else 1.0
    return choose_bundles_per_record(bundle_bytes, neurons=facts.neurons(layer), alignment=alignment, density=density)


def file_size(layers: Sequence[NeuronLayer]) -> int:
    """Bytes of a neuron file that holds these layers; also where the next region would start."""
    return round_up(max((n.offset + n.bytes for n in layers), default=0), FILE_ALIGNMENT)


def record_chunks(
    layer: NeuronLayer,
    order: npt.NDArray[np.int32] | None,
    parts_of: Callable[[Chosen], Iterable[tuple[PartEntry, Bytes]]],
) -> Iterator[memoryview]:
    """A layer's records in blocks of about `PACK_BLOCK` bytes; each block is overwritten by the next.

    order: the neuron at each position, None for the original order. `parts_of` yields the parts of the neurons it is
    given, each `[neurons, bytes]`; it is done with one before the next is asked for.
    """
    per, width = layer.bundles_per_record, layer.bundle_bytes
    step = min(layer.records, max(1, PACK_BLOCK // layer.record_bytes))
    buffer = np.zeros((step, layer.record_bytes), dtype=np.uint8)
    for first in range(0, layer.records, step):
        block = buffer[: min(step, layer.records - first)]
        start, stop = first * per, min(layer.neurons, (first + len(block)) * per)
        if stop - start < len(block) * per:
            block[-1] = 0
        for part, encoded in parts_of(slice(start, stop) if order is None else order[start:stop].astype(np.int64)):
            for place in range(per):
                at = place * width + part.offset
                rows = encoded[place::per]
                block[: len(rows), at : at + encoded.shape[1]] = rows
        yield block.data.cast("B")


def write_neurons(
    file: HashedFile, layers: Sequence[NeuronLayer], chunks_of: Callable[[int], Iterable[memoryview]]
) -> tuple[NeuronLayer, ...]:
    """Write the planned regions; `chunks_of(layer)` yields a region's records. Returns them with checksums."""
    done = []
    for i, layer in enumerate(layers):
        file.pad_to(layer.offset)
        digest = xxhash.xxh3_128()
        for chunk in chunks_of(i):
            digest.update(chunk)
            file.write(chunk)
        assert file.position == layer.offset + layer.bytes, i
        done.append(msgspec.structs.replace(layer, xxh3=digest.hexdigest()))
    file.pad_to(file_size(layers))
    return tuple(done)
