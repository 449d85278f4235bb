"""Which neurons fire and come back: assumed, until a store carries statistics of its own. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashinfer.store import Manifest
from flashinfer.store.geometry import ASSUMED_DENSITY, ASSUMED_KINSHIP, ASSUMED_REUSE


@dataclass(frozen=True)
class Firing:
    """Which neurons fire and come back.

    density: share of a layer's neurons that one token needs. hit_rate: share of needed records found in slots, where
    measured under the very plan; else it follows from the share of slots and `reuse` (`store.geometry.ASSUMED_REUSE`).
    """

    density: float = ASSUMED_DENSITY
    reuse: float = ASSUMED_REUSE
    hit_rate: float | None = None
    source: Literal["assumed", "measured"] = "assumed"

    def needed(self, tokens: int) -> float:
        """Share of a layer's neurons that so many tokens in a row need together."""
        return 1.0 - float((1.0 - self.density) ** (tokens**ASSUMED_KINSHIP))

    def missing(self, needed: float, kept: float) -> float:
        """Share of a layer's records to be read, of those needed, when slots keep that share of them."""
        if self.hit_rate is not None:
            return needed * (1.0 - self.hit_rate)
        return max(needed * float((1.0 - kept) ** self.reuse), needed - kept)


def firing_of(manifest: Manifest) -> Firing:
    """What is known of this store: nothing yet. A section of measured statistics (`manifest.sections`) is read here."""
    return Firing() if manifest.facts.sparse else Firing(density=1.0)
