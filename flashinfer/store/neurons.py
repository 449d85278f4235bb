"""The neuron file: where each layer's records lie, planned first, then written front to back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import xxhash

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.quant import codec_named
from flashinfer.store.files import HashedFile
from flashinfer.store.geometry import round_up
from flashinfer.store.manifest import NO_HASH, NeuronLayer, PartEntry

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
) -> NeuronLayer:
    """One layer's region at `offset`, which is a multiple of 4096. Its checksum is still `NO_HASH`."""
    bundle_bytes = bundle_size(parts)
    record_bytes = round_up(bundles_per_record * bundle_bytes, alignment)
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
    )


def file_size(layers: Sequence[NeuronLayer]) -> int:
    """Bytes of a neuron file that holds these layers; also where the next region would start."""
    return round_up(max((n.offset + n.bytes for n in layers), default=0), FILE_ALIGNMENT)


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
