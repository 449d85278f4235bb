"""Stores with predictors whose quality is known beforehand: made of the decision matrices, nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from flashinfer import pack
from flashinfer.store import Calibration, Store, StoreUpdate, open_store
from flashinfer.store.calibration import SECTION, Approximate
from flashinfer.store.roles import lowrank_role, threshold_role
from flashinfer.tune.sketch import PredictorTensor, decision_blocks, sketch_tensors, write_predictors
from tests.calibrated import level

WHOLE = 64
"""Rank at which the factors of `lowrank_store` are the whole decision matrix (hidden 48)."""


def lowrank_store(checkpoint: Path, path: Path, rank: int, shifts: Sequence[float]) -> Path:
    """A store whose low-rank scores are those of the decision matrix's best approximation of that rank. A level for
    each shift, by targets 0.9, 0.91, ...; the first is the chosen one."""
    pack(checkpoint, path, decision="bundled")
    store = open_store(path)
    layers = range(store.manifest.facts.num_layers)
    factors = [tensor for layer in layers for tensor in _factors(store, layer, rank)]
    _commit(store, [*sketch_tensors(store), *factors], "low-rank", shifts)
    return path


def threshold_store(checkpoint: Path, path: Path, threshold: float, factors: Sequence[float]) -> Path:
    """A store with the same threshold for every neuron, and a level for each factor on it, targets as above."""
    pack(checkpoint, path)
    store = open_store(path)
    facts = store.manifest.facts
    values = np.full(facts.intermediate_size, threshold, dtype=np.float32)
    tensors = [PredictorTensor.of(threshold_role(layer), values) for layer in range(facts.num_layers)]
    _commit(store, tensors, "threshold", factors)
    return path


def _factors(store: Store, layer: int, rank: int) -> list[PredictorTensor]:
    blocks = list(decision_blocks(store, layer))
    matrix = np.concatenate([rows for rows, _ in blocks])
    bias = np.concatenate([np.zeros(len(rows), np.float32) if b is None else b for rows, b in blocks])
    directions = np.linalg.eigh(matrix.T @ matrix).eigenvectors[:, ::-1].T[:rank]  # the most important first
    a = np.zeros((rank, matrix.shape[1]), dtype=np.float32)
    a[: len(directions)] = directions
    parts = (("a.weight", a), ("b.weight", matrix @ a.T), ("b.bias", bias))
    return [PredictorTensor.of(lowrank_role(layer, part), values) for part, values in parts]


def _commit(store: Store, tensors: list[PredictorTensor], kind: Approximate, adjust: Sequence[float]) -> None:
    layers = store.manifest.facts.num_layers
    levels = tuple(level(kind, round(0.9 + 0.01 * n, 2), value, layers, 10.5) for n, value in enumerate(adjust))
    calibration = Calibration("tests", "0" * 32, 100, 10, {}, levels, {kind: 0})
    with StoreUpdate(store) as update:
        file, entries = write_predictors(update, tensors)
        sections = {**store.manifest.sections, SECTION: update.write_calibration(calibration, store.manifest)}
        tensors_now = store.manifest.tensors | entries
        update.commit(msgspec.structs.replace(store.manifest, predictors=file, tensors=tensors_now, sections=sections))
