"""Count what fires in a model's real forward pass over a text: from a checkpoint, or from a store by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer import recording
from flashinfer.checkpoint import open_checkpoint
from flashinfer.engine import Model
from flashinfer.model.observe import Seen
from flashinfer.quant import codec_named

from .forward import product, run
from .shapes import POSITION_OFFSET, Shape, shape_of_config
from .statistics import WINDOW, hot_share, new_share, window_shares
from .write import pieces

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

RANKS = (64, 128)
RECALL = 0.95
"""Predictors are compared where they find this share of what fires."""


@dataclass
class Layer:
    """What was seen in one layer: who fired for the measured tokens, and how a predictor of each rank does."""

    fired: Mask
    predictors: dict[int, dict[str, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "sparsity": 1 - float(self.fired.mean()),
            "window_shares": [round(float(s), 5) for s in window_shares(self.fired)],
            "new_share": new_share(self.fired),
            "hot_share": hot_share(self.fired),
            "predictors": self.predictors,
        }


def fit_predictors(x: Floats, z: Floats, measured: int, ranks: Sequence[int] = RANKS) -> dict[int, dict[str, float]]:
    """Linear predictors of the pre-activations `z` from the leading principal components of the FFN inputs `x`
    (`[tokens, ..]`), fit by least squares on all but the last `measured` tokens and tried on those."""
    fit, out = len(x) - measured, {}
    mean, middle = x[:fit].mean(axis=0), z[:fit].mean(axis=0)
    centred = x[:fit] - mean
    power, left = np.linalg.eigh(centred @ centred.T)
    truth = z[fit:] > 0
    for rank in ranks:
        if 2 * rank > fit:
            continue
        scores = left[:, -rank:] / np.sqrt(power[-rank:])
        guess = (x[fit:] - mean) @ (centred.T @ scores) @ (scores.T @ (z[:fit] - middle)) + middle
        named = guess > np.quantile(guess[truth], 1 - RECALL)
        found, plain = (named & truth).sum(), guess > 0
        out[rank] = {
            "recall": float(found / truth.sum()),
            "precision": float(found / named.sum()),
            "false_positives": float((named & ~truth).mean() / (~truth).mean()),
            "named_share": float(named.mean()),
            "named_window_share": float(window_shares(named)[WINDOW - 1]),
            "named_new_share": new_share(named),
            "recall_at_zero": float((plain & truth).sum() / truth.sum()),
            "precision_at_zero": float((plain & truth).sum() / max(1, plain.sum())),
        }
    return out


class Recorder:
    """Keeps, per layer, who fired for the last `measured` tokens; fits predictors in the layers of `predicted`."""

    def __init__(self, measured: int, predicted: Sequence[int] = ()) -> None:
        self._measured, self._predicted = measured, predicted
        self.layers: list[Layer] = []

    def __call__(self, layer: int, x: Floats, z: Floats) -> None:
        """An observer of `forward.run`; x and z `[1, tokens, ..]`."""
        self.layers.append(Layer(z[0, -self._measured :] > 0))
        if layer in self._predicted:
            self.layers[-1].predictors = fit_predictors(x[0], z[0], self._measured)


class CheckpointProducts:
    """The matrices of a checkpoint on disk, a piece at a time (see `forward.Products`)."""

    def __init__(self, path: Path) -> None:
        self._checkpoint = open_checkpoint(path)
        self.shape: Shape = shape_of_config(dict(self._checkpoint.config))
        self._codec = codec_named(self.shape.dtype)

    def _rows(self, name: str, first: int, count: int) -> Floats:
        words = self._checkpoint.read_rows(name, first, first + count)
        return self._codec.decode(words.view(np.uint8))

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """See `forward.Products.embed`."""
        name = self.shape.name("embed.weight")
        x = np.stack([np.concatenate([self._rows(name, int(i), 1) for i in text]) for text in ids])
        if self.shape.family == "opt":
            x += self._rows(self.shape.name("positions.weight"), POSITION_OFFSET, ids.shape[1])
        return x

    def vectors(self, role: str, layer: int | None) -> tuple[Floats, Floats | None]:
        """See `forward.Products.vectors`."""
        weight = self._rows(self.shape.name(f"{role}.weight", layer), 0, 1)[0]
        return weight, None if self.shape.gated else self._rows(self.shape.name(f"{role}.bias", layer), 0, 1)[0]

    def linear(self, x: Floats, role: str, layer: int) -> Floats:
        """See `forward.Products.linear`."""
        name = self.shape.name(f"{role}.weight", layer)
        rows, columns = self._checkpoint.tensors[name].matrix
        flat, out = x.reshape(-1, columns), np.empty((x.shape[0] * x.shape[1], rows), dtype=np.float32)
        for first, count in pieces(rows, columns):
            out[:, first : first + count] = product(flat, self._rows(name, first, count))
        if not self.shape.gated:
            out += self._rows(self.shape.name(f"{role}.bias", layer), 0, 1)
        return out.reshape(*x.shape[:2], rows)

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()


def measure_checkpoint(path: Path, ids: Sequence[int], measured: int, predicted: Sequence[int] = ()) -> list[Layer]:
    """The layers of a checkpoint over `ids`, of which the last `measured` count."""
    products = CheckpointProducts(path)
    try:
        recorder = Recorder(measured, predicted)
        run(products.shape, products, np.array([ids]), recorder)
        return recorder.layers
    finally:
        products.close()


def measure_store(path: Path, ids: Sequence[int], measured: int, predicted: Sequence[int] = ()) -> list[Layer]:
    """The layers of a store as the engine runs it: the last `measured` tokens one by one, the others as a prompt."""
    with Model.open(path, context=len(ids)) as model:
        keeper = _Keeper(model.facts.num_layers, predicted)
        model.observe(keeper)
        _force(model, ids, measured)
    recorder = Recorder(measured, predicted)
    for layer, steps in enumerate(keeper.layers):
        recorder(layer, *(np.concatenate(part)[None] for part in zip(*steps, strict=True)))
        steps.clear()
    return recorder.layers


def record_store(path: Path, out: Path, ids: Sequence[int], measured: int) -> None:
    """Run a store as `measure_store` does, and record what it needs (`docs/recording.md`)."""
    with Model.open(path, context=len(ids)) as model:
        with recording.Recorder(out, recording.header_of(model.store.manifest, model.choice.kind)) as recorder:
            model.observe(recorder)
            _force(model, ids, measured)


def _force(model: Model, ids: Sequence[int], measured: int) -> None:
    session = model.session()
    model.step(session, ids[:-measured])
    for token in ids[-measured:]:
        model.step(session, [token])


class _Keeper:
    """An observer that keeps, by layer and step, FFN inputs and pre-activations in the layers of `predicted`, and who
    fired for single tokens in the others."""

    def __init__(self, layers: int, predicted: Sequence[int]) -> None:
        self._predicted = predicted
        self.layers: list[list[tuple[Any, Any]]] = [[] for _ in range(layers)]

    def seen(self, layer: int, step: Seen) -> None:
        """See `model.observe.Observer`."""
        if layer in self._predicted:
            self.layers[layer].append((np.array(step.x), np.array(step.gate)))
        elif len(step.gate) == 1:
            self.layers[layer].append((np.empty((1, 0), dtype=np.float32), step.gate > 0))
