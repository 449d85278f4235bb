"""A weight store as the decoder's source of weights: dense file and neuron file behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Bundle, Part
from flashinfer.choice import Choice
from flashinfer.config import RunConfig
from flashinfer.io import Reader
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, Plan, needs_all
from flashinfer.model.arena import Arena, DeviceArena
from flashinfer.model.dense import HEAD, DenseWeights
from flashinfer.model.neurons import NeuronStore
from flashinfer.model.pinned import PinnedNeurons
from flashinfer.model.slots import Slots
from flashinfer.model.stream import Piece, Stream
from flashinfer.model.uploads import UploadedNeurons, Uploads
from flashinfer.model.weights import Ahead, Group, Need, no_guess
from flashinfer.store import Facts, Geometry, Manifest, NeuronLayer, TensorEntry

Index = npt.NDArray[np.int64]


def bundle_of(layer: NeuronLayer, facts: Facts) -> Bundle:
    """The backend's view of a bundle."""
    parts: dict[str, Part] = {p.role: Part(p.offset, p.elements, p.codec) for p in layer.parts}
    decision, bias = (parts.pop(f"{facts.decision}.{kind}", None) for kind in ("weight", "bias"))
    up, up_bias = parts.get("up.weight"), parts.get("up.bias")
    return Bundle(layer.bundle_bytes, parts["down.weight"], up, up_bias, decision, bias, facts.up_activation)


def names_neurons(role: str, tensor: TensorEntry) -> bool:
    """Whether a tensor is what says who is needed: a predictor's, or a router."""
    return tensor.file == "predictors" or ".ffn.router." in role or ".ffn.shared_gate." in role


def in_order(dense: Mapping[str, Sequence[Piece]], neurons: Sequence[Sequence[Piece]]) -> list[Piece]:
    """All pieces in the order a step uses them; `dense` by matrix in the order of the file, `neurons` by layer."""
    before = [piece for role, some in dense.items() if role == "project_in.weight" for piece in some]
    layers = []
    for i, some in enumerate(neurons):
        layers += [piece for role in dense if role.startswith(f"layers.{i}.") for piece in dense[role]]
        layers += some
    after = [piece for role, some in dense.items() if role in HEAD for piece in some]
    return before + layers + after


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
        choice: Choice,
        ledger: Ledger,
    ) -> None:
        self.backend = backend
        self._bundles = [bundle_of(layer, manifest.facts) for layer in manifest.layers]
        self._arena = Arena(manifest, geometries, plan)
        self._uploads: Uploads | None = None
        if backend.copies is not None and plan.device is not None:
            self._uploads = Uploads(backend.copies, DeviceArena(manifest, plan.device, backend.copies), ledger)
            self._uploads.pin(self._arena.bytes)
        self._dense = DenseWeights(
            manifest, reader, backend, plan, ledger, run.io.max_extent, self._arena, self._uploads
        )
        self._neurons: NeuronStore | PinnedNeurons
        slots = Slots(geometries, plan, backend, self._arena, self._uploads, ledger)
        if needs_all(manifest, choice, mode):
            self._neurons = PinnedNeurons(geometries, reader, plan, run, ledger, self._arena, slots)
        else:
            self._neurons = NeuronStore(geometries, reader, plan, run, mode, ledger, self._arena, slots, backend)
        pieces = in_order(self._dense.pieces(), [self._neurons.pieces(i) for i in range(len(geometries))])
        self._stream = Stream(self._arena.bytes[self._arena.ring : self._arena.end], pieces)
        self._dense.read_from(self._stream)
        self._neurons.read_from(self._stream)
        self._groups = self._neurons.groups
        if self._uploads is not None:
            self._groups = UploadedNeurons(self._neurons.groups, self._uploads, self._arena, self._bundles).groups
        predictors = {role for role, t in manifest.tensors.items() if len(t.shape) == 2 and names_neurons(role, t)}
        self.looks_ahead = plan.guess > 0 and predictors <= plan.kept  # out of turn, nothing may be streamed
        self.vector = self._dense.vector
        self.has = self._dense.has
        self.rows_of = self._dense.rows_of
        self.blocks = self._dense.blocks
        self.lookup = self._dense.lookup
        self.expect_head = self._stream.expect_head

    @property
    def effective_window(self) -> int:
        """How many of the last tokens are wholly resident."""
        return self._neurons.effective_window

    def window(self) -> list[list[Index]]:
        """The records each layer's last tokens used, oldest first: for `warm`."""
        return self._neurons.window()

    def warm(self, window: Sequence[Sequence[Index]]) -> None:
        """Bring such records back to the slots."""
        self._neurons.warm(window)

    def bundle(self, layer: int) -> Bundle:
        """What a bundle of that layer looks like."""
        return self._bundles[layer]

    def neurons(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`."""
        return self._groups(layer, need, guess)

    def close(self) -> None:
        """Drop all weights. Nothing is in flight afterwards."""
        self._stream.close()
        self._dense.close()
        self._neurons.close()
        if self._uploads is not None:
            self._uploads.close()
        self._arena.close()
