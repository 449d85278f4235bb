"""Reads of bundles part by part: what reading costs where the parts of a neuron do not lie together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.io import Extents, Pending, Reader
from flashinfer.io.reader import check_request
from flashinfer.store import Manifest

Index = npt.NDArray[np.int64]
WEIGHT = ".weight"


@dataclass(frozen=True)
class Cuts:
    """Where parts begin in one layer's records: at `offset + n * record_bytes + within[i]`, n < records."""

    offset: int
    record_bytes: int
    records: int
    within: Index

    @property
    def end(self) -> int:
        """The first byte behind the layer."""
        return self.offset + self.records * self.record_bytes

    def before(self, at: Index) -> Index:
        """How many of them lie before each of these bytes."""
        record, rest = np.divmod(np.clip(at, self.offset, self.end) - self.offset, self.record_bytes)
        found: Index = record * len(self.within) + np.searchsorted(self.within, rest, side="left")
        return found

    def at(self, numbers: Index) -> Index:
        """The cuts of these numbers."""
        record, part = np.divmod(numbers, len(self.within))
        found: Index = self.offset + record * self.record_bytes + self.within[part]
        return found


def cuts_of(manifest: Manifest) -> list[Cuts]:
    """The beginnings of the rows of gate, up and down in every layer; a bias stays with the row before it."""
    found = []
    for n in manifest.layers:
        parts = np.array([p.offset for p in n.parts if p.role.endswith(WEIGHT)], dtype=np.int64)
        within = (np.arange(n.bundles_per_record)[:, None] * n.bundle_bytes + np.sort(parts)).ravel()
        found.append(Cuts(n.offset, n.record_bytes, n.records, within))
    return found


def split(extents: Extents, cuts: Sequence[Cuts], alignment: int) -> Extents:
    """Every extent cut where a part begins, each piece widened to the alignment within its extent.

    Neighbouring pieces may both read the unit that the cut lies in: the same bytes, to the same place.
    """
    for layer in cuts:
        extents = _split_layer(extents, layer, alignment)
    return extents


def _split_layer(extents: Extents, cuts: Cuts, alignment: int) -> Extents:
    starts, ends = extents.offsets, extents.offsets + extents.lengths
    first, behind = cuts.before(starts + 1), cuts.before(ends)
    pieces = behind - first + 1
    if not len(pieces) or int(pieces.max()) == 1:
        return extents
    owner = np.repeat(np.arange(len(pieces)), pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    is_first, is_last = nth == 0, nth == pieces[owner] - 1
    low = np.where(is_first, starts[owner], cuts.at(first[owner] + nth - 1))
    high = np.where(is_last, ends[owner], cuts.at(first[owner] + nth))
    low, high = low // alignment * alignment, -(-high // alignment) * alignment
    return Extents(low, high - low, extents.targets[owner] + low - starts[owner])


class ApartReader:
    """A `Reader` that reads one file part by part and everything else as it is asked to. Owns the reader inside,
    whose `stats` are what was really asked of the device."""

    def __init__(self, inside: Reader, file: int, cuts: Sequence[Cuts]) -> None:
        self._inside, self._file, self._cuts = inside, file, cuts
        self.alignment, self.direct, self.stats = inside.alignment, inside.direct, inside.stats
        self.note = f"{inside.note}; each part of a neuron by a read of its own"

    def submit(self, file: int, extents: Extents, target: npt.NDArray[np.uint8]) -> Pending:
        """As `Reader.submit`."""
        check_request(extents, target, self.alignment)
        if file == self._file:
            extents = split(extents, self._cuts, self.alignment)
        return self._inside.submit(file, extents, target)

    def close(self) -> None:
        """As `Reader.close`."""
        self._inside.close()
