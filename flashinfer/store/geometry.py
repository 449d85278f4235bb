"""Record geometry: which record holds which neuron, and how large a record should be. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.config import TILE_NEURONS, DiskCurve
from flashinfer.store.facts import Experts

Index = npt.NDArray[np.int64]

LARGEST_RECORD = 16 * 1024
"""A record grows beyond one bundle only up to this many bytes."""
LARGEST_EXPERT_RECORD = 1024 * 1024
"""The same of experts, whose neurons are needed together: as much as one read takes at most."""
ASSUMED_DENSITY = 0.1
"""Share of neurons assumed active while nothing is measured (field figures: 3-25 % for ReLU models)."""
ASSUMED_REUSE = 1.5
"""While nothing is measured: of the records a token needs, the share (1 - slots / records) ** ASSUMED_REUSE is in no
slot. Measured on the embedded model: 2.1 with few slots, 1.4 with many; 1 would be no locality at all."""
EXPERT_REUSE = 1.5
"""The same of a few large experts: 62 to 67 % of Mixtral's tokens, which get two of eight, share one with the token
before; 46 % would by chance (arXiv 2401.04088, table 5)."""
FINE_EXPERT_REUSE = 4.0
"""The same of FINE_EXPERTS or more, of which each token gets several. Reported of Qwen3-30B-A3B: 80 % were needed by
one of the eight tokens before, and 90 to 95 % are found in slots for 40 % (5); models differ, so somewhat less."""
FINE_EXPERTS = 32
ASSUMED_KINSHIP = 0.8
"""While nothing is measured: n tokens in a row need as many neurons as n ** ASSUMED_KINSHIP unrelated ones (a trial:
windows of 5 and 10 tokens, densities of 5, 10 and 25 %)."""


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `n`."""
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Geometry:
    """Neuron index <-> (record, place within it) for one layer.

    `position_of[i]` is where original neuron i is stored; None means position i. `unit`: neurons of one expert; 0
    where neurons are needed each for itself.
    """

    neurons: int
    bundles_per_record: int
    record_bytes: int
    bundle_bytes: int
    offset: int
    position_of: Index | None = None
    unit: int = 0

    @property
    def records(self) -> int:
        """Records in the layer."""
        return -(-self.neurons // self.bundles_per_record)

    def positions(self, neurons: Index) -> Index:
        """Stored position of each original neuron index."""
        return neurons if self.position_of is None else self.position_of[neurons]

    def records_of(self, neurons: Index) -> Index:
        """Sorted distinct records that hold these original neuron indices."""
        if self.bundles_per_record == 1:
            return neurons if self.position_of is None else np.sort(self.position_of[neurons])
        touched = np.zeros(self.records, dtype=bool)
        touched[self.positions(neurons) // self.bundles_per_record] = True
        return np.flatnonzero(touched)


def expected_seconds(bundle_bytes: int, count: int, alignment: int, density: float, disk: DiskCurve) -> float:
    """Expected read time per neuron of a layer, with `count` bundles a record and independent firing.

    Reads bridge a hole wherever that is cheaper than another read (`io.plan`), so a token costs the
    touched records, the bridged holes, and one read per hole that is too wide.
    """
    record = round_up(count * bundle_bytes, alignment)
    touched = 1 - (1 - density) ** count
    holes = disk.break_even_gap // record
    bridged = sum(g * touched * (1 - touched) ** g for g in range(1, holes + 1))
    reads = touched * (1 - touched) ** holes
    return (reads * disk.per_read_s + touched * (1 + bridged) * record / disk.bytes_per_s) / count


def choose_bundles_per_record(
    bundle_bytes: int, *, neurons: int, alignment: int, density: float = ASSUMED_DENSITY, disk: DiskCurve | None = None
) -> int:
    """Bundles a record should hold: the least expected read time, one for a bundle of 16 KiB or more."""
    disk = disk or DiskCurve()
    largest = max(1, min(neurons, LARGEST_RECORD // bundle_bytes))
    counts = range(1, largest + 1)
    return min(counts, key=lambda c: expected_seconds(bundle_bytes, c, alignment, density, disk))


def expert_bundles_per_record(bundle_bytes: int, experts: Experts) -> int:
    """Bundles a record of experts should hold: as many as one read takes, and no record crosses experts."""
    whole = math.gcd(experts.size, experts.shared_size)
    largest = max(1, LARGEST_EXPERT_RECORD // bundle_bytes)
    return max(n for n in range(1, min(whole, largest) + 1) if whole % n == 0)


def expert_records(experts: Experts, bundles_per_record: int) -> tuple[tuple[int, int], ...]:
    """First record and records of each expert, the shared ones last. Records do not cross experts."""
    each, shared = experts.size // bundles_per_record, experts.shared_size // bundles_per_record
    routed = tuple((e * each, each) for e in range(experts.count))
    return (*routed, (experts.count * each, shared)) if shared else routed


def tile_records(bundles_per_record: int, records: int, *, together: bool) -> int:
    """The most records one tile of neurons can lie in; `together`: they follow each other, as those of an expert."""
    if not together:
        return min(TILE_NEURONS, records)
    start = bundles_per_record - math.gcd(TILE_NEURONS, bundles_per_record)  # the furthest into a record it can begin
    return min(records, (start + TILE_NEURONS - 1) // bundles_per_record + 1)
