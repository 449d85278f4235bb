"""A store as calibration is about to make it: new files beside the old ones, opened before anything is committed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flashinfer.store import Calibration, Level, Manifest, Store, StoreUpdate
from flashinfer.store.calibration import SECTION, Approximate


class Trial:
    """The files of an update and the manifest that will name them; whoever opens it sees the store that will be.

    Mutates: the update, by files that nobody names in the end (it removes them).
    """

    def __init__(self, update: StoreUpdate, manifest: Manifest, draft: Calibration) -> None:
        """draft: the calibration but for statistics and levels."""
        self._update, self._manifest, self._draft = update, manifest, draft

    def store(self, levels: Sequence[Level] = ()) -> Store:
        """The store with these levels to choose from, by name. Raises StoreError, DiskFullError."""
        return self._with(msgspec.structs.replace(self._draft, levels=tuple(levels)))

    def commit(self, calibration: Calibration) -> None:
        """Make it the store's. Raises StoreError, DiskFullError."""
        self._update.commit(self._with(calibration).manifest)

    def _with(self, calibration: Calibration) -> Store:
        section = self._update.write_calibration(calibration, self._manifest)
        sections = self._manifest.sections | {SECTION: section}
        return Store(self._update.directory, msgspec.structs.replace(self._manifest, sections=sections))


def untried(predictor: Approximate, target: float, adjust: Sequence[float], recall: float, density: float) -> Level:
    """A level nobody has judged yet."""
    return Level(predictor, target, tuple(adjust), recall, density, 1.0, 1.0)
