"""Fitting the thresholds of a gated model, layer by layer, each kept when it is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, open_backend
from flashinfer.model.weights import decode_tiles
from flashinfer.quant import codec_named
from flashinfer.store import Activation, Store
from flashinfer.store.files import writing
from flashinfer.store.roles import ffn_role, threshold_role
from flashinfer.tune.collect import sample_file
from flashinfer.tune.gather import Source
from flashinfer.tune.samples import Samples
from flashinfer.tune.sketch import PredictorTensor
from flashinfer.tune.threshold import BLOCK, Floats, GluLayer, Scores, score_layer, spread
from flashinfer.tune.work import Work

LOOKED_AT = 1024
"""Samples that thresholds follow from; of more, as many evenly spread."""
BASE = 0.5
"""Density of the thresholds as they are stored; levels are factors on them."""


@dataclass(frozen=True)
class Thresholds:
    """Scores of all layers: thresholds for any mean density follow from them."""

    scores: tuple[Scores, ...]

    def tensors(self) -> list[PredictorTensor]:
        """The thresholds at the density BASE, as the store keeps them."""
        taus = spread(self.scores, BASE)
        pairs = enumerate(zip(self.scores, taus, strict=True))
        return [PredictorTensor.of(threshold_role(i), s.thresholds(tau)) for i, (s, tau) in pairs]

    def factors(self, density: float) -> tuple[float, ...]:
        """By layer, the factor on these thresholds that gives that mean density."""
        return tuple(a / b for a, b in zip(spread(self.scores, density), spread(self.scores, BASE), strict=True))

    def densities(self, density: float) -> tuple[float, ...]:
        """By layer, the density at that mean density."""
        return tuple(s.density(tau) for s, tau in zip(self.scores, spread(self.scores, density), strict=True))


def fit_thresholds(
    store: Store, work: Work, *, threads: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Thresholds:
    """Scores of all layers, from the samples of `collect`.

    Raises:
        StoreError, DiskFullError: as reading the store and keeping results do.
    """
    layers, found = store.manifest.facts.num_layers, []
    with closing(open_backend("cpu", max(1, threads))) as backend:
        for i in range(layers):
            found.append(_fit(store, work, i, backend))
            progress(i + 1, layers)
    return Thresholds(tuple(found))


def thresholding_bytes(hidden: int, samples: int) -> int:
    """Memory that fitting one layer takes, in bytes, at most."""
    tokens = min(samples, LOOKED_AT)
    return 4 * tokens * (3 * hidden + 12 * BLOCK) + 16 * (1 << 19) * 3 + (16 << 20)


def _fit(store: Store, work: Work, layer: int, backend: Backend) -> Scores:
    step, path = f"thresholds of layer {layer}", work.path / f"layer-{layer}.thresholds.npz"
    if work.done(step) is None:
        with Source(store) as source:
            scores = score_layer(_weights(store, source, layer, backend), _inputs(work, layer))
        with writing(path), path.open("wb") as file:
            np.savez(file, weights=scores.weights, counts=scores.counts, lost=scores.lost, output=scores.output)
        work.note(step)
    with np.load(path) as data:
        return Scores(data["weights"], data["counts"], data["lost"], float(data["output"]))


def _inputs(work: Work, layer: int) -> Floats:
    """Some of the layer's samples, evenly spread: `[samples, hidden]`."""
    with Samples(sample_file(work, layer)) as samples:
        wanted = np.unique(np.linspace(0, samples.count - 1, min(samples.count, LOOKED_AT)).astype(np.int64))
        return np.concatenate([samples.read(int(i), int(i) + 1).x for i in wanted])


def _weights(store: Store, source: Source, layer: int, backend: Backend) -> GluLayer:
    facts = store.manifest.facts
    codecs: dict[str, str] = {p.role: p.codec for p in store.manifest.layers[layer].parts}
    for part in ("gate.weight", "up.weight", "gate.bias", "up.bias"):
        if (t := store.manifest.tensors.get(ffn_role(layer, part))) is not None:
            codecs[part] = t.codec

    def rows(part: str, first: int, last: int) -> Floats:
        data = source.parts(layer, slice(first, last), [part])[part]
        return codec_named(codecs[part]).decode(data, 1 if part.endswith("bias") else facts.hidden_size)

    def bias(part: str) -> Floats | None:
        return rows(part, 0, facts.intermediate_size)[:, 0] if part in codecs else None

    return GluLayer(
        facts.intermediate_size, partial(activated, backend, facts.activation), partial(rows, "gate.weight"),
        partial(rows, "up.weight"), partial(rows, "down.weight"), bias("gate.bias"), bias("up.bias"),
    )  # fmt: skip


def activated(backend: Backend, activation: Activation, products: Floats) -> Floats:
    """Activations of products `[tokens, neurons]`, as the model has them."""
    tokens, neurons = products.shape
    index: npt.NDArray[np.int64] = decode_tiles(np.arange(neurons))
    fired = backend.fetch(backend.fire(backend.place(products), activation, index))
    return np.ascontiguousarray(fired.transpose(1, 0, 2).reshape(tokens, -1)[:, :neurons])
