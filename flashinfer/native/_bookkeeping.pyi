"""Plans of reads and the window policy. `flashinfer.io.plan` and `flashinfer.cache` are what to use."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]

def plan(
    records: Index, record_bytes: int, offset: int, alignment: int, max_gap: int, max_extent: int
) -> tuple[Index, Index, Index, Index]:
    """Places of the records, then offsets, lengths and targets of the reads, as `io.plan.numpy_plan`."""

class Window:
    """What `cache.window.WindowCache` decides. It writes to `slot_of` `[records]`, which others may read.

    half_life, piles_per_halving, steps, added: of `cache.heat`.

    Raises:
        ValueError: a negative size.
    """

    def __init__(
        self,
        slot_of: Index,
        slots: int,
        window: int,
        keeps: bool,
        half_life: float,
        piles_per_halving: float,
        steps: float,
        added: Sequence[float],
    ) -> None: ...
    @property
    def used(self) -> int:
        """Slots occupied."""

    def free(self) -> int:
        """Slots that hold nothing."""

    def step(self, needed: Index, recent: Sequence[Index]) -> tuple[Index, Index, Index, Index, Index]:
        """The fields of a `cache.Change`, in order. Raises IndexError for a record that is none."""

    def preload(self, records: Index) -> Index:
        """The slots. The caller has seen to it that the records fit and that none is resident."""

    def active(self) -> list[Index]:
        """The record sets of the window, oldest first."""

    def effective(self) -> int:
        """How many of the last tokens are wholly resident."""

class Tiers:
    """What `cache.tiers.TieredCache` decides. Arguments, methods and errors as those of `Window`; `near` and `far` are
    slots of either kind."""

    def __init__(
        self,
        slot_of: Index,
        near: int,
        far: int,
        window: int,
        keeps: bool,
        half_life: float,
        piles_per_halving: float,
        steps: float,
        added: Sequence[float],
    ) -> None: ...
    @property
    def used(self) -> int:
        """See `Window.used`."""

    def free(self) -> int:
        """See `Window.free`."""

    def step(self, needed: Index, recent: Sequence[Index]) -> tuple[Index, Index, Index, Index, Index]:
        """See `Window.step`."""

    def preload(self, records: Index) -> Index:
        """See `Window.preload`."""

    def active(self) -> list[Index]:
        """See `Window.active`."""

    def effective(self) -> int:
        """See `Window.effective`."""
