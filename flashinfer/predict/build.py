"""From a choice to the predictor that carries it out."""

from __future__ import annotations

from collections.abc import Sequence

from flashinfer.choice import Choice
from flashinfer.predict.approximate import LowRank, Threshold
from flashinfer.predict.base import Matrices, Predictor
from flashinfer.predict.certified import Certified
from flashinfer.predict.criterion import bounds
from flashinfer.predict.plain import Everything, Exact
from flashinfer.store import Facts


def build_predictor(choice: Choice, facts: Facts, separate: Sequence[bool], matrices: Matrices) -> Predictor:
    """separate: for each layer, whether its decision matrix is a dense one (else it is in the bundles)."""
    layers = range(facts.num_layers)
    decisions = [f"layers.{i}.ffn.{facts.decision}" for i in layers]
    if choice.kind == "certified":
        return Certified(matrices, [f"layers.{i}.ffn.sketch" for i in layers], facts.fires_above)
    if choice.kind == "low-rank":
        assert choice.level is not None
        return LowRank(matrices, [f"layers.{i}.ffn.lowrank" for i in layers], choice.level.adjust)
    if choice.kind == "threshold":
        assert choice.level is not None
        found = [matrices.vector(f"layers.{i}.ffn.threshold") for i in layers]
        fetch = matrices.backend.fetch
        scaled = [fetch(t) * s for t, s in zip(found, choice.level.adjust, strict=True) if t is not None]
        return Threshold(matrices, decisions, [bounds(facts.activation, t) for t in scaled])
    if choice.kind == "exact" and facts.sparse:
        return Exact(matrices, decisions, facts.fires_above)
    return Everything(matrices, [role if apart else None for role, apart in zip(decisions, separate, strict=True)])
