"""What lies before and behind the layers of a model: from tokens to states, and from states to how likely they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Buffer, Bundle
from flashinfer.config import TILE_TOKENS
from flashinfer.model.decoder import Decoder
from flashinfer.model.rows import prefill_rows
from flashinfer.model.weights import Ahead, Group, Need, no_guess
from flashinfer.store.geometry import round_up
from flashinfer.tune.gather import Source
from flashinfer.tune.layerwise import States, values_of
from flashinfer.tune.perplexity import Score, normalise

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

CHUNK = 8 * TILE_TOKENS
"""Tokens scored at once."""


class Ends:
    """Embedding and head of a store, read as they are needed."""

    def __init__(self, source: Source, backend: Backend, context: int) -> None:
        facts = msgspec.structs.replace(source.manifest.facts, num_layers=0)
        weights = _NoLayers(source, backend)
        self._backend, self._decoder = backend, Decoder(facts, weights, context, window=0)

    def embed(self, windows: Sequence[Ids], out: States) -> None:
        """Append the states before the first layer. Raises StoreError, DiskFullError."""
        for ids in windows:
            x = self._decoder.forward(ids, prefill_rows(0, len(ids)), [])
            out.append(self._backend.fetch(x)[: len(ids)])

    def score(self, windows: Sequence[Ids], states: States) -> Score:
        """How likely each token of a window but its first was, given the states behind the last layer."""
        nll, tokens, begin = 0.0, 0, 0
        for ids in windows:
            for first in range(0, len(ids) - 1, CHUNK):
                targets = ids[first + 1 : first + 1 + CHUNK]
                logits = self._logits(states.read(begin + first, len(targets)))
                normalise(logits)
                nll -= float(logits[np.arange(len(targets)), targets].sum(dtype=np.float64))
                tokens += len(targets)
            begin += len(ids)
        return Score(nll, tokens)

    def _logits(self, states: F32) -> F32:
        padded = np.zeros((round_up(len(states), TILE_TOKENS), states.shape[1]), dtype=np.float32)
        padded[: len(states)] = states
        return self._decoder.head(self._backend.place(padded))[: len(states)]


class _NoLayers:
    """See `model.weights.Weights`."""

    looks_ahead = False

    def __init__(self, source: Source, backend: Backend) -> None:
        self.backend, self._source = backend, source
        self._vectors: dict[str, Buffer] = {}

    def vector(self, role: str) -> Buffer | None:
        if role not in self._source.manifest.tensors:
            return None
        if role not in self._vectors:
            self._vectors[role] = self.backend.vector(values_of(self._source, role))
        return self._vectors[role]

    def has(self, role: str) -> bool:
        return role in self._source.manifest.tensors

    def rows_of(self, role: str) -> int:
        return self._source.manifest.tensors[role].shape[0]

    def blocks(self, role: str) -> Iterator[tuple[int, Buffer]]:
        for first, rows in self._source.row_blocks(role):
            values = self._values(role, rows)
            raw = values.reshape(-1).view(np.uint8)
            yield first, self.backend.matrix(raw, "f32", *values.shape, keep=False)

    def lookup(self, role: str, ids: Ids) -> F32:
        return self._values(role, self._source.rows(role, ids))

    def bundle(self, layer: int) -> Bundle:
        raise AssertionError("there are no layers")

    def neurons(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        raise AssertionError("there are no layers")

    def _values(self, role: str, rows: Bytes) -> F32:
        codec, columns = self._source.codec(role), self._source.manifest.tensors[role].shape[1]
        return np.ascontiguousarray(codec.decode(rows, columns))
