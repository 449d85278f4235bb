"""From logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.config import SamplingConfig
from flashinfer.errors import FlashInferError

Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int64]
_Scores = npt.NDArray[np.float64]


def check_sampling(config: SamplingConfig) -> None:
    """Raise ValueError naming the first value that is out of its range."""
    c = config
    if not (math.isfinite(c.temperature) and c.temperature >= 0):
        raise ValueError(f"temperature must be a number of at least 0 (0 is greedy), not {c.temperature}")
    if not isinstance(c.top_k, int) or c.top_k < 0:
        raise ValueError(f"top_k must be a whole number of at least 0 (0 is off), not {c.top_k}")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 is off), not {c.top_p}")
    if not 0 <= c.min_p <= 1:
        raise ValueError(f"min_p must lie between 0 (off) and 1, not {c.min_p}")
    if not (math.isfinite(c.repetition_penalty) and c.repetition_penalty > 0):
        raise ValueError(f"repetition_penalty must be above 0 (1 is off), not {c.repetition_penalty}")
    if c.seed is not None and (not isinstance(c.seed, int) or c.seed < 0):
        raise ValueError(f"seed must be a whole number of at least 0, not {c.seed}")


class Sampler:
    """Draws tokens; holds the random state, so one per generation.

    Order and meaning are those of transformers' logits processors: repetition penalty, temperature,
    top-k, top-p, min-p. The same seed and logits give the same tokens (PCG64, one draw per token).
    """

    def __init__(self, config: SamplingConfig) -> None:
        """Raises ValueError where a value of `config` is out of its range."""
        check_sampling(config)
        self._config = config
        self._random = np.random.Generator(np.random.PCG64(config.seed))

    @property
    def state(self) -> dict[str, Any]:
        """The random state, as plain values; set it to continue where another sampler stopped."""
        return dict(self._random.bit_generator.state)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._random.bit_generator.state = value

    def sample(self, logits: Floats, history: Sequence[int]) -> int:
        """The next token for `logits` [vocab] after the tokens `history`; greedy takes the lowest of equals.

        Raises:
            FlashInferError: a logit is NaN.
        """
        scores = self._penalised(logits, history)
        if self._config.temperature == 0:
            return int(np.argmax(scores))
        ids, weights = self._candidates(scores)
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def probabilities(self, logits: Floats, history: Sequence[int]) -> Floats:
        """The distribution `sample` draws from, float32 [vocab]; greedy puts all on one token."""
        result = np.zeros(len(logits), dtype=np.float32)
        if self._config.temperature == 0:
            result[self.sample(logits, history)] = 1.0
            return result
        ids, weights = self._candidates(self._penalised(logits, history))
        result[ids] = weights / weights.sum()
        return result

    def _penalised(self, logits: Floats, history: Sequence[int]) -> _Scores:
        scores = logits.astype(np.float64)
        if np.isnan(scores).any():
            raise FlashInferError("the model computed NaN; run `flashinfer verify` on the store")
        penalty = self._config.repetition_penalty
        if penalty != 1.0 and len(history) > 0:
            seen = np.unique(np.asarray(history, dtype=np.int64))
            seen = seen[seen < len(scores)]
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores

    def _candidates(self, scores: _Scores) -> tuple[_Ids, _Scores]:
        """Token ids that may be drawn, ascending, and their weights (not normalised, largest is 1)."""
        c = self._config
        ids = np.arange(len(scores))
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
            scores = (scores - scores.max()) / c.temperature
        if 0 < c.top_k < len(scores):
            ids, scores = _keep(scores >= np.partition(scores, -c.top_k)[-c.top_k], ids, scores)
        weights = np.exp(scores)
        if c.top_p < 1:
            ids, weights = _keep(_nucleus(weights, c.top_p), ids, weights)
        if c.min_p > 0:
            ids, weights = _keep(weights >= c.min_p * weights.max(), ids, weights)
        return ids, weights


def _keep(mask: npt.NDArray[np.bool_], ids: _Ids, values: _Scores) -> tuple[_Ids, _Scores]:
    return ids[mask], values[mask]


def _nucleus(weights: _Scores, top_p: float) -> npt.NDArray[np.bool_]:
    """The fewest tokens, most probable first, whose probabilities sum to at least `top_p`."""
    ascending = np.argsort(weights, kind="stable")
    below = np.cumsum(weights[ascending]) <= (1 - top_p) * weights.sum()
    below[-1] = False
    mask = np.empty(len(weights), dtype=np.bool_)
    mask[ascending] = ~below
    return mask
