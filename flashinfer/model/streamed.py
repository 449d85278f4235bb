"""A weight store as the decoder's source of weights: dense file and neuron file behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Bundle, Part
from flashinfer.config import RunConfig
from flashinfer.errors import StoreError
from flashinfer.io import Reader
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, Plan
from flashinfer.model.dense import DenseWeights
from flashinfer.model.neurons import NeuronStore
from flashinfer.model.weights import Group
from flashinfer.predict import Selection
from flashinfer.store import Geometry, Manifest, NeuronLayer

Index = npt.NDArray[np.int64]


def bundle_of(layer: NeuronLayer) -> Bundle:
    """The backend's view of a bundle. Raises StoreError for a decision matrix this version cannot use."""
    parts = {p.role: Part(p.offset, p.elements, p.codec) for p in layer.parts}
    if layer.decision != "separate" or "gate.weight" in parts:
        raise StoreError(
            "the decision matrix of this store is bundled, which exact selection cannot use; pack it again"
        )
    return Bundle(layer.bundle_bytes, parts["down.weight"], parts.get("up.weight"), parts.get("up.bias"))


class StreamedWeights:
    """See `model.weights.Weights`. Owns the buffers; the reader and the backend belong to the caller."""

    def __init__(
        self,
        manifest: Manifest,
        geometries: Sequence[Geometry],
        reader: Reader,
        backend: Backend,
        plan: Plan,
        run: RunConfig,
        mode: Mode,
        ledger: Ledger,
    ) -> None:
        self.backend = backend
        self._bundles = [bundle_of(layer) for layer in manifest.layers]
        self._dense = DenseWeights(manifest, reader, backend, plan, ledger, run.io.max_extent)
        self._neurons = NeuronStore(manifest, geometries, reader, plan, run, mode, ledger)
        self.vector = self._dense.vector
        self.has = self._dense.has
        self.rows_of = self._dense.rows_of
        self.blocks = self._dense.blocks
        self.lookup = self._dense.lookup

    @property
    def effective_window(self) -> int:
        """How many of the last tokens are wholly resident."""
        return self._neurons.effective_window

    def bundle(self, layer: int) -> Bundle:
        """What a bundle of that layer looks like."""
        return self._bundles[layer]

    def neurons(self, layer: int, selection: Selection, tiles: Index) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`."""
        return self._neurons.groups(layer, selection, tiles)

    def close(self) -> None:
        """Drop all weights. Nothing is in flight afterwards."""
        self._dense.close()
        self._neurons.close()
