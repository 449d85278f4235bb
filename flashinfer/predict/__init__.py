"""Who is needed: the active set of a step, before the FFN's bundles are read."""

from flashinfer.predict.approximate import LowRank, Threshold
from flashinfer.predict.base import Guess, Matrices, Predictor, Span
from flashinfer.predict.build import build_predictor
from flashinfer.predict.certified import Certified
from flashinfer.predict.plain import Everything, Exact, Oracle
from flashinfer.predict.router import Router
from flashinfer.predict.selection import Selection, select

__all__ = [
    "Certified",
    "Everything",
    "Exact",
    "Guess",
    "LowRank",
    "Matrices",
    "Oracle",
    "Predictor",
    "Router",
    "Selection",
    "Span",
    "Threshold",
    "build_predictor",
    "select",
]
