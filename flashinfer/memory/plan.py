"""What the resolver is asked, and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flashinfer.backend.footprint import NATIVE, Footprint
from flashinfer.choice import Choice
from flashinfer.config import Cap, KvType, RunConfig
from flashinfer.firing import Firing

Mode = Literal["cached", "always-miss", "naive"]


@dataclass(frozen=True)
class DevicePlan:
    """Where every byte of a device's memory goes. All sizes in bytes; `total <= cap` always holds.

    overhead: of its driver and libraries. bookkeeping: the tables that say where each record is. half: one of the two
    through which comes what is not kept there; both and the neurons' padding are `weight_staging`. resident: matrices
    that are kept there; slots: of each layer's records.
    """

    cap: int
    overhead: int
    kv_cache: int
    activations: int
    weight_vectors: int
    weight_adapter: int
    weight_scratch: int
    weight_staging: int
    bookkeeping: int
    half: int
    slots: tuple[int, ...]
    weight_resident: int = 0
    weight_slots: int = 0
    resident: frozenset[str] = frozenset()

    @property
    def weight_total(self) -> int:
        """Every byte there that holds a weight."""
        parts = (self.weight_vectors, self.weight_resident, self.weight_slots, self.weight_adapter)
        return sum(parts) + self.weight_staging + self.weight_scratch

    @property
    def total(self) -> int:
        """What counts against the cap."""
        return self.weight_total + self.overhead + self.kv_cache + self.activations + self.bookkeeping

    def to_json(self) -> dict[str, Any]:
        """All fields, plain, with the sums."""
        fields = asdict(self) | {"resident": sorted(self.resident), "slots": list(self.slots)}
        return fields | {"weight_total": self.weight_total, "total": self.total}


@dataclass(frozen=True)
class Plan:
    """Where every byte of the cap goes. All sizes in bytes; `total <= cap` always holds.

    `weight_*` fields are DRAM that holds weights in any form; the rest only counts under `--memory`.
    neuron_staging: one half of the buffer misses are read to. guess: one half of the buffer for guesses. ring: memory
    what is known beforehand is streamed through, in pieces of at most `piece` bytes. device: the same for the memory of
    a device that has its own; what it keeps is not in DRAM.
    """

    cap: int
    cap_kind: Literal["memory", "weight-memory"]
    context: int
    weight_vectors: int
    weight_resident: int
    weight_slots: int
    weight_staging: int
    weight_scratch: int
    baseline: int
    kv_cache: int
    activations: int
    bookkeeping: int
    neuron_staging: int
    ring: int
    piece: int
    resident: frozenset[str]
    slots: tuple[int, ...]
    kv_type: KvType = "f32"
    guess: int = 0
    weight_adapter: int = 0
    device: DevicePlan | None = None

    @property
    def kept(self) -> frozenset[str]:
        """Matrices in the host's memory, or in the device's."""
        return self.resident if self.device is None else self.resident | self.device.resident

    @property
    def near(self) -> tuple[int, ...]:
        """Slots of each layer on the device; none without one."""
        return (0,) * len(self.slots) if self.device is None else self.device.slots

    @property
    def weight_total(self) -> int:
        """Every DRAM byte that holds a weight: resident, slots, an adapter, read buffers, converted tiles."""
        parts = (self.weight_vectors, self.weight_resident, self.weight_slots, self.weight_adapter)
        return sum(parts) + self.weight_staging + self.weight_scratch

    @property
    def total(self) -> int:
        """What counts against the cap."""
        if self.cap_kind == "weight-memory":
            return self.weight_total
        return self.weight_total + self.baseline + self.kv_cache + self.activations + self.bookkeeping

    def to_json(self) -> dict[str, Any]:
        """All fields, plain, with the sums."""
        fields = asdict(self) | {"resident": sorted(self.resident), "slots": list(self.slots)}
        fields["device"] = None if self.device is None else self.device.to_json()
        return fields | {"weight_total": self.weight_total, "total": self.total}


@dataclass(frozen=True)
class AdapterNeeds:
    """What an adapter takes at run time: bytes of its matrices; float32 values of what it adds, per token of a step
    (`values`) and once (`logits`); and its largest rank."""

    bytes: int = 0
    values: int = 0
    logits: int = 0
    rank: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's own memory that may be used, and how many of them its driver and libraries take."""

    cap: int
    overhead: int = 0


@dataclass(frozen=True)
class Request:
    """What is asked of the resolver. Exactly one of the cap's `memory` and `weight_memory` is a number of bytes.

    baseline: resident bytes of the process before any weight is loaded (measured by the caller).
    alignment: the unit of the reader's device.
    footprint: what the backend keeps. choice: the predictor; firing: what it selects, by layer (None: as assumed).
    adapter: what is added to the weights, nothing by default. device: where the arithmetic's memory is not the host's.
    """

    context: int
    threads: int
    alignment: int
    baseline: int
    run: RunConfig
    cap: Cap
    footprint: Footprint = NATIVE
    mode: Mode = "cached"
    choice: Choice = field(default_factory=Choice)
    firing: tuple[Firing, ...] | None = None
    adapter: AdapterNeeds = field(default_factory=AdapterNeeds)
    device: DeviceMemory | None = None
