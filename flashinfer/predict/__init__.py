"""Who is needed: the active set of a step, before the FFN's bundles are read."""

from flashinfer.predict.selection import Everything, Exact, Predictor, Selection

__all__ = ["Everything", "Exact", "Predictor", "Selection"]
