"""Predictors and a calibration made of plain arithmetic: the same bytes on every machine."""

from __future__ import annotations

import msgspec
import numpy as np

from flashinfer.store import Calibration, LayerStatistics, Level, Manifest, Store, StoreUpdate, open_store
from flashinfer.store.roles import lowrank_role, sketch_role, threshold_role
from flashinfer.tune.sketch import PredictorTensor, write_predictors

RANK = 32


def values(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/128 below 1 in size, exact in every plain codec."""
    n = np.arange(int(np.prod(shape)), dtype=np.int64)
    return (((n * 53 + seed * 17) % 251 - 125) / 128).astype(np.float32).reshape(shape)


def tensors_for(m: Manifest, *, codec: str = "f16") -> list[PredictorTensor]:
    """All roles a store of that manifest may have: sketches where the decision matrix is in the bundles."""
    f = m.facts
    found = []
    for i, layer in enumerate(m.layers):
        found += [
            PredictorTensor.of(lowrank_role(i, "a.weight"), values(i, RANK, f.hidden_size), codec),
            PredictorTensor.of(lowrank_role(i, "b.weight"), values(i + 1, f.intermediate_size, RANK), codec),
            PredictorTensor.of(lowrank_role(i, "b.bias"), values(i + 2, f.intermediate_size)),
            PredictorTensor.of(threshold_role(i), np.abs(values(i + 3, f.intermediate_size))),
        ]
        if layer.decision == "bundled":
            sketch = values(i + 4, f.intermediate_size, f.hidden_size)
            found.append(PredictorTensor.of(sketch_role(i, "weight"), sketch, "int8g32"))
            found.append(PredictorTensor.of(sketch_role(i, "slack"), np.abs(values(i + 5, f.intermediate_size))))
            if any(p.role == f"{f.decision}.bias" for p in layer.parts):
                found.append(PredictorTensor.of(sketch_role(i, "bias"), values(i + 6, f.intermediate_size)))
    return found


def statistics(density: float = 0.25) -> LayerStatistics:
    """Of a layer that behaves."""
    return LayerStatistics(
        density=density,
        new=tuple(density / (k + 1) for k in range(17)),
        union=tuple(min(1.0, density * 1.25**k) for k in range(8)),
        missing=tuple(density * (16 - i) / 16 for i in range(17)),
        hot=(0.0625, 0.125, 0.25, 0.375, 0.5, 0.875),
    )


def calibration_for(layers: int = 2) -> Calibration:
    """Statistics and three levels for a model of so many layers."""
    adjust = tuple(0.5 * i for i in range(layers))
    return Calibration(
        generator="golden",
        text_xxh3="0123456789abcdef" * 2,
        tokens=1000,
        held_out=200,
        statistics={"exact": (statistics(),) * layers, "low-rank": (statistics(0.5),) * layers},
        levels=(
            Level("low-rank", 0.95, adjust, 0.9375, 0.25, 12.5, 12.0),
            Level("low-rank", 0.99, adjust, 0.984375, 0.5, 12.25, 12.0),
            Level("threshold", 0.5, adjust, 0.96875, 0.5, 12.125, 12.0),
        ),
        chosen={"low-rank": 1, "threshold": 2},
    )


def add_predictors(store: Store, *, codec: str = "f16") -> Store:
    """The store after a committed change: all predictors it may have, and a calibration."""
    m = store.manifest
    with StoreUpdate(store) as update:
        predictors, entries = write_predictors(update, tensors_for(m, codec=codec))
        section = update.write_calibration(calibration_for(m.facts.num_layers), m)
        changed = msgspec.structs.replace(
            m, predictors=predictors, tensors=m.tensors | entries, sections={"calibration": section}
        )
        update.commit(changed)
    return open_store(store.root)
