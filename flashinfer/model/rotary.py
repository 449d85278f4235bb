"""Rotary position tables (RoFormer, arXiv 2104.09864), with the frequency scalings the facts declare."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flashinfer.store.facts import Rope

Floats = npt.NDArray[np.float32]


def inverse_frequencies(rope: Rope, context: int) -> Floats:
    """Angle per position of each pair, `[rotary_dim / 2]`, in a run of at most `context` positions.

    * `linear`: every frequency is divided by `factor`.
    * `llama3`, of the Llama 3.1 release: wavelengths above original_context / low_freq_factor are stretched by
      `factor`, those below original_context / high_freq_factor kept, blended between.
    * `yarn` (arXiv 2309.00071, section 3.2): pairs that turn less than beta_slow times in original_context are
      stretched by `factor`, those that turn more than beta_fast times kept, a ramp over the pairs between.
    * `longrope` (arXiv 2402.13753, section 3.3): each pair is stretched by its own factor: of `long_factor` where the
      context is longer than original_context, else of `short_factor`.
    """
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    inverse = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    match rope.scaling:
        case "linear":
            return (inverse / np.float32(rope.factor)).astype(np.float32)
        case "llama3":
            return _blended(inverse, rope.factor, _llama3_kept(rope, inverse))
        case "yarn":
            return _blended(inverse, rope.factor, _yarn_kept(rope))
        case "longrope":
            factors = rope.long_factor if context > rope.original_context else rope.short_factor
            stretch: Floats = np.array(factors, dtype=np.float32)
            return inverse / stretch
        case _:
            return inverse


def _blended(inverse: Floats, factor: float, kept: npt.NDArray[np.floating]) -> Floats:
    """Frequencies divided by `factor`, but for the share that is kept."""
    return ((1 - kept) * inverse / factor + kept * inverse).astype(np.float32)


def _llama3_kept(rope: Rope, inverse: Floats) -> npt.NDArray[np.floating]:
    turns = rope.original_context / (2 * math.pi / inverse)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)


def _yarn_kept(rope: Rope) -> npt.NDArray[np.floating]:
    def pair(turns: float) -> float:
        """The pair that turns so often in the original context, as a fraction."""
        span = math.log(rope.original_context / (turns * 2 * math.pi))
        return rope.rotary_dim * span / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    ramp = (np.arange(rope.rotary_dim // 2) - first) / (last - first if last != first else 0.001)
    kept: npt.NDArray[np.floating] = 1 - np.clip(ramp, 0, 1)
    return kept


def rotary_tables(rope: Rope, positions: int, context: int) -> tuple[Floats, Floats]:
    """cos and sin, each `[positions, rotary_dim / 2]`; made once, so a position always has the same bits."""
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse_frequencies(rope, context))
    factor, way = np.float32(rope.attention_factor), np.float32(-1 if rope.reversed else 1)
    return np.cos(angles) * factor, np.sin(angles) * (way * factor)
