"""Stores with predictors, made by plain means: singular vectors for factors, one threshold for all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from flashinfer.store import Calibration, LayerStatistics, Level, Store, StoreUpdate, open_store
from flashinfer.store.roles import lowrank_role, threshold_role
from flashinfer.tune.sketch import PredictorTensor, decision_blocks, sketch_tensors, write_predictors

RANK = 32
STATISTICS = LayerStatistics(
    density=0.3, new=(0.3,) * 17, union=tuple(min(1.0, 0.3 * 1.2**i) for i in range(8)),
    missing=tuple(0.4 * (1 - i / 16) for i in range(17)), hot=(0.1, 0.2, 0.3, 0.4, 0.5, 0.9),
)  # fmt: skip


def lowrank_tensors(store: Store, rank: int = RANK) -> list[PredictorTensor]:
    """The best approximation of each decision matrix by two factors; padded with zeros where it has fewer ranks."""
    tensors = []
    for i in range(store.manifest.facts.num_layers):
        blocks = list(decision_blocks(store, i))
        rows = np.concatenate([rows for rows, _ in blocks])
        bias = np.concatenate([np.zeros(len(r), np.float32) if b is None else b for r, b in blocks])
        u, s, v = np.linalg.svd(rows, full_matrices=False)
        a, b = np.zeros((rank, rows.shape[1]), np.float32), np.zeros((len(rows), rank), np.float32)
        kept = min(rank, len(s))
        a[:kept], b[:, :kept] = v[:kept], u[:, :kept] * s[:kept]
        tensors.append(PredictorTensor.of(lowrank_role(i, "a.weight"), a, "f16"))
        tensors.append(PredictorTensor.of(lowrank_role(i, "b.weight"), b, "int8g32"))
        tensors.append(PredictorTensor.of(lowrank_role(i, "b.bias"), bias))
    return tensors


def calibration(layers: int, levels: list[Level]) -> Calibration:
    chosen = {level.predictor: n for n, level in reversed(list(enumerate(levels)))}
    kinds = ("low-rank", "threshold")
    statistics = dict.fromkeys(("exact", "certified", *kinds), (STATISTICS,) * layers)
    return Calibration(
        "tests", "0" * 32, 100, 10, statistics, tuple(levels), {k: chosen[k] for k in kinds if k in chosen}
    )


def level(predictor: str, target: float, adjust: float, layers: int, perplexity: float = 10.1) -> Level:
    return Level(predictor, target, (adjust,) * layers, 0.95, 0.3, perplexity, 10.0)  # type: ignore[arg-type]


def calibrate_plainly(path: Path, *, threshold: float = 0.1) -> Path:
    """Give a store its predictors: sketches and factors to bundled ones, thresholds to models that are not sparse."""
    store = open_store(path)
    m, layers = store.manifest, store.manifest.facts.num_layers
    if m.layers[0].decision == "bundled":
        tensors = [*sketch_tensors(store), *lowrank_tensors(store)]
        levels = [level("low-rank", 0.95, 0.0, layers), level("low-rank", 0.99, 0.5, layers, 10.01)]
    elif not m.facts.sparse:
        values = np.full(m.facts.intermediate_size, threshold, np.float32)
        tensors = [PredictorTensor.of(threshold_role(i), values) for i in range(layers)]
        levels = [level("threshold", 0.4, 1.0, layers), level("threshold", 0.7, 0.5, layers, 10.01)]
    else:
        tensors, levels = [], []
    with StoreUpdate(store) as update:
        if tensors:
            file, entries = write_predictors(update, tensors)
            m = msgspec.structs.replace(m, predictors=file, tensors=m.tensors | entries)
        section = update.write_calibration(calibration(layers, levels), m)
        update.commit(msgspec.structs.replace(m, sections={"calibration": section}))
    return path
