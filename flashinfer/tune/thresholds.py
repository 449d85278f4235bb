"""Fitting the thresholds of a gated model, layer by layer, each kept when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, open_backend
from flashinfer.model.weights import decode_tiles
from flashinfer.quant import codec_named
from flashinfer.store import Activation, Store
from flashinfer.store.roles import ffn_role, threshold_role
from flashinfer.tune.collect import fit_span, sample_file
from flashinfer.tune.gather import Source
from flashinfer.tune.samples import Samples
from flashinfer.tune.sketch import PredictorTensor
from flashinfer.tune.threshold import BLOCK, Floats, GluLayer, Scores, score_layer
from flashinfer.tune.work import Work

LOOKED_AT = 1024
"""Samples that thresholds follow from; of more, as many evenly spread."""
BASE = 0.5
"""Density of the thresholds as they are stored; levels are factors on them."""


@dataclass(frozen=True)
class Thresholds:
    """Scores of all layers: thresholds for any density, the same in each layer, follow from them. They take 8 MiB a
    layer and stay on disk; one layer's are in memory at a time."""

    work: Work
    layers: int

    def tensors(self) -> list[PredictorTensor]:
        """The thresholds at the density BASE, as the store keeps them."""
        return [PredictorTensor.of(threshold_role(i), s.thresholds(s.tau(BASE))) for i, s in enumerate(self._scores())]

    def factors(self, density: float) -> tuple[float, ...]:
        """By layer, the factor on these thresholds that gives that density; 1 where they are 0."""
        taus = [(s.tau(density), s.tau(BASE)) for s in self._scores()]
        return tuple(tau / base if base > 0 else 1.0 for tau, base in taus)

    def _scores(self) -> Iterator[Scores]:
        for i in range(self.layers):
            data = self.work.kept(_name(i))
            yield Scores(data["weights"], data["counts"])


def fit_thresholds(
    store: Store, work: Work, *, threads: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Thresholds:
    """Scores of all layers, from the samples of `collect`.

    Raises:
        StoreError, DiskFullError: as reading the store and keeping results do.
    """
    layers = store.manifest.facts.num_layers
    with closing(open_backend("cpu", max(1, threads))) as backend:
        for i in range(layers):
            _fit(store, work, i, backend)
            progress(i + 1, layers)
    return Thresholds(work, layers)


def thresholding_bytes(hidden: int, samples: int) -> int:
    """Memory that fitting one layer takes, in bytes, at most."""
    tokens = min(samples, LOOKED_AT)
    return 4 * tokens * (3 * hidden + 12 * BLOCK) + 16 * (1 << 19) * 3 + (16 << 20)


def _fit(store: Store, work: Work, layer: int, backend: Backend) -> None:
    step = f"thresholds of layer {layer}"
    if work.done(step) is None:
        with Source(store) as source:
            s = score_layer(_weights(store, source, layer, backend), _inputs(work, layer))
        work.keep(_name(layer), weights=s.weights, counts=s.counts)
        work.note(step)


def _name(layer: int) -> str:
    return f"layer-{layer}.thresholds"


def _inputs(work: Work, layer: int) -> Floats:
    """Some of the samples that are fitted to, evenly spread: `[samples, hidden]`."""
    with Samples(sample_file(work, layer)) as samples:
        span = fit_span(samples.count)
        wanted = np.unique(np.linspace(0, span.stop - 1, min(span.stop, LOOKED_AT)).astype(np.int64))
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
