"""What the steps of a calibration share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flashinfer import machine
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import CapTooSmallError
from flashinfer.store import Level, Manifest, Store, StoreUpdate
from flashinfer.tune.options import Options
from flashinfer.tune.work import Work
from flashinfer.units import format_size

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""


@dataclass(frozen=True)
class Job:
    """One calibration. cap: of the whole process, for all its steps. bos: what each window of text begins with."""

    store: Store
    update: StoreUpdate
    work: Work
    options: Options
    cap: Cap
    run: RunConfig
    device: str
    bos: int | None
    context: int
    progress: Progress

    def telling(self, what: str) -> Callable[[int, int], None]:
        """Progress of one thing."""
        return partial(self.progress, what)

    def has_room(self, size: int) -> bool:
        """Whether the cap leaves so many bytes beside what the process has now."""
        return self.cap.memory is None or machine.resident_bytes() + size <= self.cap.memory

    def check_room(self, size: int, what: str) -> None:
        """Raises CapTooSmallError where the cap does not leave `size` bytes, which `what` takes."""
        if self.cap.memory is not None and not self.has_room(size):
            here = machine.resident_bytes()
            raise CapTooSmallError(
                f"{what} takes {format_size(size)} beside the {format_size(here)} the process has, and the cap is "
                f"{format_size(self.cap.memory)}; raise --memory",
                here + size,
            )


@dataclass(frozen=True)
class Made:
    """What was fitted: the manifest that names the new files, and levels nobody has judged. `level_at`: the level for
    any target of a threshold, None for predictors whose levels are all there."""

    manifest: Manifest
    levels: tuple[Level, ...]
    level_at: Callable[[float], Level] | None = None
