"""Statistics of who is needed, taken while a text is scored: masks go to disk, and are counted layer by layer after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from flashinfer.model.observe import Mask, Seen
from flashinfer.store import LayerStatistics, Store
from flashinfer.tune.samples import Samples, SampleWriter
from flashinfer.tune.statistics import LayerCounter

COUNTED = 256
"""Tokens counted at once."""


class MaskFiles:
    """An observer that writes, layer by layer, who was needed for each token; with `fired`, who of them fired.

    A context manager; the files are whole once it ends without an error.
    """

    def __init__(self, folder: Path, name: str, store: Store, *, fired: bool = False) -> None:
        """Files are named after `name`. Raises StoreError, DiskFullError."""
        facts = store.manifest.facts
        self.paths = [folder / f"{name}-{layer}.masks" for layer in range(facts.num_layers)]
        self._files, self._fired = ExitStack(), fired
        self._writers = [self._files.enter_context(SampleWriter(p, 0, facts.intermediate_size)) for p in self.paths]

    def seen(self, layer: int, step: Seen) -> None:
        """Write the masks of a step."""
        everyone: Mask = np.ones(step.active.shape, dtype=bool)
        mask = step.active if self._fired else everyone if step.needed is None else step.needed
        self._writers[layer].add(np.empty((len(mask), 0), dtype=np.float32), mask)

    def __enter__(self) -> MaskFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)


def count(store: Store, paths: Sequence[Path]) -> tuple[LayerStatistics, ...]:
    """Statistics of each layer from its file of masks, one layer in memory at a time; the files are removed.

    Raises:
        StoreError: a file cannot be read. ValueError: they hold too few tokens.
    """
    found = []
    for layer, path in enumerate(paths):
        counter = LayerCounter(store.geometry(layer))
        with Samples(path) as samples:
            for block in samples.blocks(range(samples.count), COUNTED):
                counter.add(block.active)
        found.append(counter.result())
        path.unlink()
    return tuple(found)
