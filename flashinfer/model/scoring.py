"""What becomes of attention's scores in a layer of a model of these facts. Pure."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Scoring
from flashinfer.store.facts import Facts

Floats = npt.NDArray[np.float32]


def scoring_of(facts: Facts, layer: int, sinks: Floats | None = None) -> Scoring:
    """The scoring of one layer. sinks: its own, `[heads]`, where the model has some."""
    slopes = None if facts.alibi == 0 else alibi_slopes(facts.num_heads, facts.alibi)
    if slopes is not None and facts.alibi_scaled:
        slopes *= np.float32(facts.head_dim**-0.5 if facts.attention_scale is None else facts.attention_scale)
    return Scoring(facts.attention_softcap, slopes, facts.window_of(layer), sinks)


def alibi_slopes(heads: int, largest: float = 8.0) -> Floats:
    """By how much each head's scores fall per position, `[heads]` (ALiBi, arXiv 2108.12409, section 3).

    Of n heads, a power of two, head i from 1 on has 2 ** (-largest i / n). Of other numbers the first have the slopes
    of the power of two below, the rest every second one of the power above, as in the authors' code.
    """
    below = 1 << int(math.log2(heads))
    exponents = [i / below for i in range(1, below + 1)] + [(2 * i + 1) / (2 * below) for i in range(heads - below)]
    slopes: Floats = (2.0 ** (-largest * np.array(exponents))).astype(np.float32)
    return slopes
