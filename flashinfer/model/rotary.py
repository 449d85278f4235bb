"""Rotary position tables (RoFormer, arXiv 2104.09864), with the frequency scalings the facts declare."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flashinfer.store.facts import Rope

Floats = npt.NDArray[np.float32]


def inverse_frequencies(rope: Rope) -> Floats:
    """Angle per position of each pair, `[rotary_dim / 2]`.

    `llama3` is the scaling of the Llama 3.1 release: wavelengths above original_context / low_freq_factor
    are stretched by `factor`, those below original_context / high_freq_factor kept, blended between.
    """
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    inverse = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor)
    if rope.scaling == "none":
        return inverse
    wavelength = 2 * math.pi / inverse
    turns = rope.original_context / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * inverse / rope.factor + blend * inverse).astype(np.float32)


def rotary_tables(rope: Rope, positions: int) -> tuple[Floats, Floats]:
    """cos and sin, each `[positions, rotary_dim / 2]`; made once, so a position always has the same bits."""
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse_frequencies(rope))
    return np.cos(angles), np.sin(angles)
