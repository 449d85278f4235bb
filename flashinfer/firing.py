"""Which neurons a layer needs, and which come back: measured at calibration, else assumed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from flashinfer.choice import Choice
from flashinfer.store import Calibration, Experts, Facts, LayerStatistics, Manifest
from flashinfer.store.geometry import (
    ASSUMED_DENSITY,
    ASSUMED_KINSHIP,
    ASSUMED_REUSE,
    EXPERT_REUSE,
    FINE_EXPERT_REUSE,
    FINE_EXPERTS,
)  # fmt: skip

SAME_LEVEL = 0.02
"""Statistics were taken at one level of a predictor; levels whose density differs by less are not told apart."""


@dataclass(frozen=True)
class Firing:
    """One layer, under one predictor.

    density: share of its neurons that one token needs. hit_rate: share of needed records found in slots, where
    measured under the very plan; else it follows from `measured` where there is a calibration, or from the share of
    slots and `reuse` (`store.geometry.ASSUMED_REUSE`).
    always: share of its neurons, among `density`, that every token needs. together: how many others are needed or not
    as one, an expert's.
    """

    density: float = ASSUMED_DENSITY
    reuse: float = ASSUMED_REUSE
    hit_rate: float | None = None
    source: Literal["assumed", "measured"] = "assumed"
    measured: LayerStatistics | None = None
    always: float = 0.0
    together: int = 1

    def needed(self, tokens: int) -> float:
        """Share of a layer's neurons that so many tokens in a row need together."""
        if self.measured is None:
            return self.always + (1.0 - self.always) * self._chosen(tokens)
        return _between(self.measured.union, math.log2(tokens))

    def touched(self, tokens: int, bundles_per_record: int) -> float:
        """Share of a layer's records that so many tokens in a row need."""
        if self.measured is not None and tokens == 1:
            return self.measured.missing[0]
        return 1.0 - float((1.0 - self.needed(tokens)) ** max(1.0, bundles_per_record / self.together))

    def missing(self, tokens: int, bundles_per_record: int, kept: float) -> float:
        """Share of a layer's records to be read for so many tokens, when slots keep that share of them."""
        needed = self.touched(tokens, bundles_per_record)
        if self.hit_rate is not None:
            return needed * (1.0 - self.hit_rate)
        if self.measured is not None and tokens == 1:
            return _between(self.measured.missing, kept * (len(self.measured.missing) - 1))
        if not self.always:
            return max(needed * float((1.0 - kept) ** self.reuse), needed - kept)
        chosen = 1.0 - self.always  # what every token needs has the first places
        left = max(0.0, kept - self.always) / chosen if chosen else 0.0
        missing = self._chosen(tokens) * float((1.0 - left) ** self.reuse)
        return max(0.0, self.always - kept) + chosen * max(missing, self._chosen(tokens) - left)

    def _chosen(self, tokens: int) -> float:
        """Of the neurons that not every token needs, the share that so many tokens in a row need together."""
        if self.always == 1.0:
            return 0.0
        if self.measured is not None:
            return max(0.0, self.needed(tokens) - self.always) / (1.0 - self.always)
        each = (self.density - self.always) / (1.0 - self.always)
        return 1.0 - float((1.0 - each) ** (tokens**ASSUMED_KINSHIP))


def _between(known: tuple[float, ...], at: float) -> float:
    """Values known at 0, 1, 2, ..., straight lines in between; the last one holds beyond."""
    i = min(int(at), len(known) - 1)
    here, there = known[i], known[min(i + 1, len(known) - 1)]
    return here + (at - i) * (there - here)


def firing_of(manifest: Manifest, choice: Choice, calibration: Calibration | None = None) -> tuple[Firing, ...]:
    """What is known of each layer of this store under that predictor."""
    if not choice.selects(manifest.facts):
        return (Firing(density=1.0),) * len(manifest.layers)
    known = calibration.statistics.get(choice.kind) if calibration is not None and choice.kind != "all" else None
    if choice.kind == "router":
        layers = range(len(manifest.layers))
        return tuple(_routed(manifest.facts, i, choice, None if known is None else known[i]) for i in layers)
    if known is not None:
        chosen = sum(s.density for s in known) / len(known)
        times = 1.0 if choice.level is None else choice.level.density / chosen
        scaled = [_times(s, times) for s in known]
        return tuple(Firing(s.density, source="measured", measured=s) for s in scaled)
    density = ASSUMED_DENSITY if choice.level is None else choice.level.density
    return (Firing(density=density),) * len(manifest.layers)


def _routed(facts: Facts, layer: int, choice: Choice, known: LayerStatistics | None) -> Firing:
    """Where nothing was measured, tokens choose experts as if at random, but for a reuse that is assumed; a dense layer
    is needed by all."""
    experts = facts.routed(layer)
    if experts is None:
        return Firing(density=1.0, always=1.0)
    reuse = EXPERT_REUSE if experts.count < FINE_EXPERTS else FINE_EXPERT_REUSE
    chosen = _needed_share(experts, choice.experts or experts.per_token)
    assumed = Firing(chosen, reuse, always=experts.shared_size / experts.neurons, together=experts.size)
    if known is None:
        return assumed
    times = chosen / _needed_share(experts, experts.per_token)
    return replace(assumed, source="measured", measured=_times(known, times))


def _needed_share(experts: Experts, per_token: int) -> float:
    """Of a layer's neurons, the share that a token needs which gets so many experts."""
    return (per_token * experts.size + experts.shared_size) / experts.neurons


def _times(s: LayerStatistics, times: float) -> LayerStatistics:
    """Statistics of another level of the same predictor: so many times as many are needed."""
    if abs(times - 1.0) < SAME_LEVEL:
        return s
    union, missing = (tuple(min(1.0, times * share) for share in shares) for shares in (s.union, s.missing))
    return msgspec.structs.replace(s, density=union[0], union=union, missing=missing)


def mean_firing(layers: tuple[Firing, ...]) -> Firing:
    """All layers in one, for people: the mean density, and where it comes from."""
    density = sum(f.density for f in layers) / len(layers)
    return Firing(density, layers[-1].reuse, layers[-1].hit_rate, layers[-1].source)
