"""How much of what all neurons add to the output is kept by thresholds: the recall of models that are not sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, open_backend
from flashinfer.backend.bounded import exceeds
from flashinfer.config import BackendName
from flashinfer.predict.criterion import bounds
from flashinfer.quant import codec_named
from flashinfer.store import Activation, Store
from flashinfer.store.roles import ffn_role, threshold_role
from flashinfer.tune.agreement import Inputs
from flashinfer.tune.gather import Source
from flashinfer.tune.thresholds import activated

Floats = npt.NDArray[np.float32]

TOKENS = 128
"""Tokens looked at."""
NEURONS = 256
"""Neurons looked at together."""


def contribution_kept(
    store: Store, inputs: Inputs, factors: Sequence[Sequence[float]], backend: BackendName = "auto"
) -> list[tuple[float, ...]]:
    """At several levels at once: in each layer, of the sum of |act(g) u| |down| over all neurons and some tokens, the
    share of the neurons whose |act(g)| is beyond their threshold. Reads every FFN weight once.

    factors: of each level, on the thresholds of each layer. Returns the layers of each level.

    Raises:
        StoreError, StoreReadError: the weights are damaged, or cannot be read.
    """
    layers = range(store.manifest.facts.num_layers)
    with closing(open_backend("cpu", 1, backend)) as compute:
        by_layer = [_layer_kept(store, compute, layer, inputs, [f[layer] for f in factors]) for layer in layers]
    return list(zip(*by_layer, strict=True))


def _layer_kept(store: Store, backend: Backend, layer: int, inputs: Inputs, factors: Sequence[float]) -> list[float]:
    activation, thresholds = store.manifest.facts.activation, store.read_tensor(threshold_role(layer))
    x, total, kept = inputs.some(layer, TOKENS), 0.0, np.zeros(len(factors))
    for first, block in _weights(store, layer):
        decision, size = _contributions(backend, activation, x, block)
        total += float(size.sum(dtype=np.float64))
        own = thresholds[first : first + decision.shape[1]].astype(np.float32)
        for n, factor in enumerate(factors):
            high, low, up = bounds(activation, own * np.float32(factor))
            chosen = exceeds(decision, high, (low, up))
            kept[n] += size.sum(where=chosen, dtype=np.float64)
    return [float(share) for share in kept / total] if total else [1.0] * len(factors)


def _contributions(
    backend: Backend, activation: Activation, x: Floats, block: dict[str, Floats]
) -> tuple[Floats, Floats]:
    """Decision products of some neurons and tokens, and by how much each adds to the output: `[tokens, neurons]`."""
    products = {}
    for name in ("gate", "up"):
        if f"{name}.weight" in block:
            products[name] = x @ block[f"{name}.weight"].T
            if f"{name}.bias" in block:
                products[name] += block[f"{name}.bias"][:, 0]
    decision = products.get("gate", products["up"])
    size = np.abs(activated(backend, activation, decision)) * np.linalg.norm(block["down.weight"], axis=1)
    return decision, size * np.abs(products["up"]) if "gate" in products else size


def _weights(store: Store, layer: int) -> Iterator[tuple[int, dict[str, Floats]]]:
    """The FFN weights of a layer, some neurons at a time: the first of them, and by part `[neurons, hidden]`, of biases
    `[neurons, 1]`."""
    manifest, hidden = store.manifest, store.manifest.facts.hidden_size
    names = [f"{m}.{kind}" for m in ("gate", "up") for kind in ("weight", "bias")] + ["down.weight"]
    codecs: dict[str, str] = {p.role: p.codec for p in manifest.layers[layer].parts if p.role in names}
    codecs |= {name: t.codec for name in names if (t := manifest.tensors.get(ffn_role(layer, name))) is not None}
    width = {name: 1 if name.endswith("bias") else hidden for name in codecs}
    first = 0
    with Source(store) as source:
        for block in source.blocks(layer, list(codecs)):
            count = len(block["down.weight"])
            for start in range(0, count, NEURONS):
                rows = {name: data[start : start + NEURONS] for name, data in block.items()}
                yield first + start, {n: codec_named(codecs[n]).decode(data, width[n]) for n, data in rows.items()}
            first += count
