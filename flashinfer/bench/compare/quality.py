"""Whether contenders compute the same, and how well they predict the text they are made to read. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


def perplexity(logits: Logits, script: Sequence[int]) -> float:
    """Of the forced tokens: exp of the mean of -log p. `logits[n]`, `[vocab]`, came before token n of the script; what
    follows its last token is not looked at."""
    rows = logits[: len(script)].astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    log_p = rows[np.arange(len(script)), list(script)] - np.log(np.exp(rows).sum(axis=-1))
    return float(np.exp(-log_p.mean()))


def largest_difference(logits: Logits, reference: Logits) -> float:
    """The greatest difference of any logit at any position."""
    return float(np.abs(logits - reference).max())


def same_greedy(logits: Logits, reference: Logits) -> int:
    """At how many positions the most likely token is the same."""
    return int((logits.argmax(-1) == reference.argmax(-1)).sum())
