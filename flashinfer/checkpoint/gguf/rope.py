"""Rotary positions: from what a GGUF file says of them to what config.json would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""The parameters of every model published with llama3 scaling; GGUF keeps only what came of them."""


def rope_config(say: Mapping[str, Any], factors: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`.

    Args:
        say: the metadata keys from `rope.` on, without that.
        factors: the tensor rope_freqs.weight, by which each frequency is divided: llama3 scaling.

    Raises:
        ValueError: the factors are not those of llama3 scaling, or yarn does not say its original context.
    """
    theta = float(say.get("freq_base", 10000.0))
    found: dict[str, Any] = {"rope_theta": theta}
    kind = say.get("scaling.type", "linear" if "scale_linear" in say else "none")
    factor = say.get("scaling.factor", say.get("scale_linear", 1.0))
    if factors is not None and (factors != 1).any():
        scale = float(factors.max())
        if not np.allclose(factors, llama3_factors(theta, 2 * len(factors), scale), rtol=1e-4):
            raise ValueError("its rope_freqs.weight is not that of Llama 3.1, which alone is understood")
        found["rope_scaling"] = {
            "rope_type": "llama3", "factor": scale, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _ORIGINAL,
        }  # fmt: skip
    elif kind == "linear" and factor != 1.0:
        found["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    elif kind not in ("none", "linear"):
        found["rope_scaling"] = {"rope_type": kind, "factor": float(factor)}
        if "scaling.original_context_length" in say:
            found["rope_scaling"]["original_max_position_embeddings"] = say["scaling.original_context_length"]
        elif kind == "yarn":
            raise ValueError("yarn scaling without rope.scaling.original_context_length")
    return found


def llama3_factors(theta: float, dimensions: int, factor: float) -> npt.NDArray[np.float64]:
    """What llama3 scaling divides each of the `dimensions / 2` frequencies by (Llama 3.1's reference code)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dimensions, 2) / dimensions)
    smooth = np.clip((_ORIGINAL / wavelength - _LOW) / (_HIGH - _LOW), 0, 1)
    scaled: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return scaled
