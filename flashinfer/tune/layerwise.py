"""A text through a model one layer at a time: all its tokens through a layer before the next one is read.

Memory is that of one layer in float32; the states of the tokens between layers are in files. What came into each
matrix can be listened to, and a layer's weights can be changed before it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Buffer, Bundle, Part
from flashinfer.errors import StoreError
from flashinfer.model.decoder import Decoder
from flashinfer.model.rows import prefill_rows
from flashinfer.model.weights import Ahead, Group, Need, no_guess
from flashinfer.store import Facts
from flashinfer.store.files import writing
from flashinfer.store.neurons import BundlePart
from flashinfer.store.roles import ffn_role
from flashinfer.tune.gather import Source
from flashinfer.tune.rewrite import layer_weights

F32 = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Listener = Callable[[str, F32], None]
"""Told what comes into a matrix: its part (`attn.q.weight`, ...), and inputs `[tokens, columns]`. q, k and v share what
comes into q; gate and up what comes into the decision matrix."""


class Layer:
    """All weights of one layer in float32, by part (`attn.q.weight`, `ffn.norm.bias`, ...).

    `matrix` gives arrays to be changed in place. Those of `ffn.down.weight` are `[neurons, hidden]`: a row is what a
    neuron adds to the output.
    """

    def __init__(self, source: Source, number: int) -> None:
        """Raises StoreReadError, StoreError: see `gather.Source`."""
        facts, prefix = source.manifest.facts, f"layers.{number}."
        weights = layer_weights(source.manifest, number)
        self.number, self.bundle = number, _bundle_of(weights, facts)
        self.bundles: F32 = np.zeros((facts.intermediate_size + 1, self.bundle.bytes // 4), dtype=np.float32)
        """One for each neuron, and one of zeros."""
        inside = {"up.weight": self.bundle.up, "up.bias": self.bundle.up_bias, "down.weight": self.bundle.down}
        self._tensors = dict[str, F32]()
        for part, p in weights.items():
            if (place := inside.get(part)) is not None:
                columns = slice(place.offset // 4, place.offset // 4 + p.elements)
                self._tensors[f"ffn.{part}"] = self.bundles[:-1, columns]
            else:
                self._tensors[f"ffn.{part}"] = np.empty((facts.intermediate_size, p.elements), dtype=np.float32)
        self._fill(source, [*weights])
        for role, t in source.manifest.tensors.items():
            part = role.removeprefix(prefix)
            own = role.startswith(prefix) and t.file == "dense" and t.codec != "i32"
            if own and part not in self._tensors:
                self._tensors[part] = values_of(source, role)

    def _fill(self, source: Source, parts: Sequence[str]) -> None:
        codecs = {part: source.codec(ffn_role(self.number, part)) for part in parts}
        first = 0
        for block in source.blocks(self.number, parts):
            count = 0
            for part, rows in block.items():
                to, count = self._tensors[f"ffn.{part}"], len(rows)
                to[first : first + count] = codecs[part].decode(rows, to.shape[1])
            first += count

    def matrix(self, part: str) -> F32:
        """A matrix `[rows, columns]`, or a column of biases."""
        return self._tensors[part]

    def get(self, part: str) -> F32 | None:
        """The same, None where the layer has none."""
        return self._tensors.get(part)


def _bundle_of(weights: Mapping[str, BundlePart], facts: Facts) -> Bundle:
    """A bundle of everything but the decision matrix and its bias, in float32."""
    places, at = dict[str, Part](), 0
    for part in ("up.weight", "down.weight", "up.bias"):
        if part in weights and not part.startswith(f"{facts.decision}."):
            places[part] = Part(4 * at, weights[part].elements, "f32")
            at += weights[part].elements
    up, bias = places.get("up.weight"), places.get("up.bias")
    return Bundle(4 * at, places["down.weight"], up, bias, up_activation=facts.up_activation)


def values_of(source: Source, role: str) -> F32:
    """A dense tensor in float32, in its shape; checked."""
    t = source.manifest.tensors[role]
    codec, columns = source.codec(role), t.shape[1] if len(t.shape) == 2 else 1
    out = np.empty((t.shape[0], columns), dtype=np.float32)
    for first, rows in source.row_blocks(role):
        out[first : first + len(rows)] = codec.decode(rows, columns)
    return out.reshape(t.shape)


class _OneLayer:
    """See `model.weights.Weights`: a model of that layer alone, whose embeddings are the states before it."""

    looks_ahead = False

    def __init__(self, backend: Backend, layer: Layer) -> None:
        self.backend, self._layer = backend, layer
        self.states: F32 = np.empty((0, 0), dtype=np.float32)
        self.now, self.tiles = "", np.empty((0, 0), dtype=np.int64)

    def vector(self, role: str) -> Buffer | None:
        values = self._layer.get(role.removeprefix("layers.0."))
        return None if values is None else self.backend.vector(values.reshape(-1))

    def has(self, role: str) -> bool:
        return self._layer.get(role.removeprefix("layers.0.")) is not None

    def rows_of(self, role: str) -> int:
        return len(self._layer.matrix(role.removeprefix("layers.0.")))

    def blocks(self, role: str) -> Iterator[tuple[int, Buffer]]:
        self.now = role.removeprefix("layers.0.")
        values = self._layer.matrix(self.now)
        yield 0, self.backend.matrix(values.reshape(-1).view(np.uint8), "f32", *values.shape, keep=False)

    def lookup(self, role: str, ids: Index) -> F32:
        return self.states[ids]

    def bundle(self, layer: int) -> Bundle:
        return self._layer.bundle

    def neurons(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        self.tiles, bundles = need.tiles, self._layer.bundles
        offsets = np.where(self.tiles < 0, len(bundles) - 1, self.tiles) * self._layer.bundle.bytes
        yield Group(0, len(offsets), bundles.reshape(-1).view(np.uint8), self.tiles, offsets)


class _Listening:
    """A backend that says what comes into matrices; all else is that of the one it stands before."""

    def __init__(self, weights: _OneLayer, layer: Layer, hear: Listener) -> None:
        self._backend, self._weights, self._layer, self._hear = weights.backend, weights, layer, hear
        self.tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear(self, out: Buffer, first: int, x: Buffer, weights: Buffer) -> None:
        self._hear(self._weights.now, self._host(x))
        self._backend.linear(out, first, x, weights)

    def ffn(
        self, acc: Buffer, x: Buffer, fired: Buffer, memory: npt.NDArray[np.uint8], offsets: Index, bundle: Bundle
    ) -> None:
        self._hear("ffn.down.weight", self._activated(self._host(x), fired))
        self._backend.ffn(acc, x, fired, memory, offsets, bundle)

    def _activated(self, x: F32, fired: Buffer) -> F32:
        """What every neuron's row of down is multiplied by, `[tokens, neurons]`."""
        out = self._in_order(fired)
        if self._layer.bundle.up is not None:
            up = x @ self._layer.matrix("ffn.up.weight").T
            bias = self._layer.get("ffn.up.bias")
            placed = self._backend.place(up if bias is None else up + bias.reshape(-1))
            out *= self._in_order(self._backend.fire(placed, self._layer.bundle.up_activation, self._weights.tiles))
        return out

    def _in_order(self, fired: Buffer) -> F32:
        """Values of tiles of neurons `[tiles, tokens, TILE_NEURONS]` as `[tokens, neurons]`."""
        out = np.zeros((self.tokens, len(self._layer.bundles) - 1), dtype=np.float32)
        for tile, values in zip(self._weights.tiles, fired, strict=True):
            out[:, tile[tile >= 0]] = self._host(values)[:, tile >= 0]
        return out

    def _host(self, x: Buffer) -> F32:
        return self._backend.fetch(x)[: self.tokens]


def one_layer(facts: Facts, layer: int) -> Facts:
    """Facts of a model of that layer alone, which is given hidden states."""
    return msgspec.structs.replace(
        facts, num_layers=1, embed_size=facts.hidden_size, embed_scale=1.0, embed_norm=False,
        rope=facts.rope_of(layer), local_rope=None, window=facts.window_of(layer), global_layers=(),
    )  # fmt: skip


def run_layer(
    layer: Layer,
    facts: Facts,
    backend: Backend,
    windows: Sequence[int],
    before: States,
    after: States | None,
    hear: Listener | None = None,
) -> None:
    """All windows, of so many tokens each, through one layer; each begins anew.

    before: states `[tokens, hidden]` of all windows, one after the other. after: where those behind the layer go; None:
    nowhere. hear: is told what comes into each matrix.

    Raises:
        StoreError, DiskFullError: states cannot be read or written.
    """
    weights = _OneLayer(backend, layer)
    ear = None
    if hear is not None:
        ear = _Listening(weights, layer, hear)
        weights.backend = cast("Backend", ear)
    decoder = Decoder(one_layer(facts, layer.number), weights, max(windows), window=0)
    kv = decoder.new_kv(max(windows), "f32")
    first = 0
    for count in windows:
        weights.states = before.read(first, count)
        if ear is not None:
            ear.tokens = count
        x = decoder.forward(np.arange(count), prefill_rows(0, count), kv)
        if after is not None:
            after.append(backend.fetch(x)[:count])
        first += count


class States:
    """Hidden states `[tokens, hidden]`, float32, in a file of the work's directory."""

    def __init__(self, path: Path, hidden: int) -> None:
        self.path, self._hidden = path, hidden

    def restart(self) -> States:
        """Begin anew. Raises StoreError."""
        with writing(self.path):
            self.path.write_bytes(b"")
        return self

    def append(self, states: F32) -> None:
        """Write some more. Raises StoreError, DiskFullError."""
        with writing(self.path), self.path.open("ab") as file:
            np.ascontiguousarray(states, dtype=np.float32).tofile(file)

    def read(self, first: int, count: int) -> F32:
        """Those of `count` tokens from `first`. Raises StoreError."""
        width = 4 * self._hidden
        try:
            found = np.fromfile(self.path, dtype=np.float32, count=count * self._hidden, offset=first * width)
            return found.reshape(count, self._hidden)
        except (OSError, ValueError) as e:
            raise StoreError(f"{self.path}, kept by a calibration, cannot be read ({e}); calibrate again") from e

    def remove(self) -> None:
        """The file goes."""
        self.path.unlink(missing_ok=True)
