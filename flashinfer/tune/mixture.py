"""Mixtures of experts: the router says who is needed, so nothing is learnt; counted is which experts come back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from flashinfer.config import Cap, RunConfig
from flashinfer.model.observe import Seen
from flashinfer.store import LayerStatistics, Store
from flashinfer.store.geometry import Geometry
from flashinfer.tune.collect import looked_at, windows_of
from flashinfer.tune.statistics import LayerCounter

Ids = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


def unit_of(store: Store, layer: int) -> int:
    """Neurons that are needed together: an expert's; of a dense layer, whose neurons all are, a record's."""
    experts = store.manifest.facts.routed(layer)
    return store.manifest.layers[layer].bundles_per_record if experts is None else experts.size


class Experts:
    """An observer that keeps whose experts tokens get: a bit for each unit of a layer.

    Takes `bytes` for all of a text's tokens.
    """

    def __init__(self, store: Store, tokens: int) -> None:
        layers = store.manifest.layers
        self._units = [unit_of(store, i) for i in range(len(layers))]
        self._counts = [-(-n.neurons // unit) for n, unit in zip(layers, self._units, strict=True)]
        self._masks = [np.zeros((tokens, -(-count // 8)), dtype=np.uint8) for count in self._counts]
        self._done = [0] * len(layers)

    @property
    def bytes(self) -> int:
        """Of all masks."""
        return sum(masks.nbytes for masks in self._masks)

    def seen(self, layer: int, step: Seen) -> None:
        """Keep a step's."""
        first, count = self._done[layer], len(step.active)
        self._masks[layer][first : first + count] = np.packbits(step.active[:, :: self._units[layer]], axis=1)
        self._done[layer] += count

    def statistics(self) -> tuple[LayerStatistics, ...]:
        """By layer, of units in place of neurons and of records: an expert's records are read together.

        Raises:
            ValueError: too few tokens were seen.
        """
        found = []
        for masks, done, count in zip(self._masks, self._done, self._counts, strict=True):
            counter = LayerCounter(Geometry(count, 1, 1, 1, 0))
            counter.add(np.unpackbits(masks[:done], axis=1, count=count).astype(bool))
            found.append(counter.result())
        return tuple(found)


def count_experts(
    store: Store, ids: Ids, *, context: int, bos: int | None, cap: Cap, run: RunConfig, device: str, progress: Progress
) -> tuple[LayerStatistics, ...]:
    """Run the text in windows of `context` tokens that begin anew, and count whose experts its tokens get.

    Raises:
        CapTooSmallError: the cap is below the model's floor and what looking on takes. Else what `Model` raises.
    """
    windows = windows_of(ids, context, bos)
    total, done = sum(map(len, windows)), 0
    experts = Experts(store, total)
    shown = run.prefill_chunk * max(layer.neurons for layer in store.manifest.layers)
    with (
        looked_at(store, cap, experts.bytes + shown, context=context, run=run, device=device) as model,
        ExitStack() as end,
    ):
        session = model.session()
        end.callback(session.close)
        model.observe(experts)
        for window in windows:
            session.truncate(0)
            model.step(session, window.tolist())
            done += len(window)
            progress(done, total)
        model.observe(None)
    return experts.statistics()
