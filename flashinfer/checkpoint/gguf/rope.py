"""Rotary positions: from what a GGUF file says of them to what config.json would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.gguf.description import Description

Factors = npt.NDArray[np.float32]

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors by which each frequency is divided: of Llama 3.1, and of LongRoPE beyond and within the original context."""
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""The parameters of every model published with llama3 scaling; GGUF keeps only what came of them."""
_TYPE, _FACTOR, _ATTENTION = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"
_CONTEXT = "rope.scaling.original_context_length"
_BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
_FOLLOWED = {
    "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.finetuned", _TYPE, _FACTOR,
    _ATTENTION, _CONTEXT, *_BETAS.values(),
}  # fmt: skip


def rope_config(of: Description, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """What config.json has under `rope_parameters`.

    Args:
        of: what the file says; of a head the first `rope.dimension_count` values are turned.
        factors: those of the tensors `FREQUENCIES`, `LONG` and `SHORT` that there are.

    Raises:
        ValueError: something is said that is not followed, or that contradicts something else.
    """
    for key in of.said:
        if key.startswith("rope.") and key not in _FOLLOWED and key not in of.architecture.keys.values():
            raise of.wrong(key, "which is not followed")
    head_dim, key = of.head_dim, "rope.dimension_count"
    turned = of.whole(key, head_dim)
    if turned > head_dim:
        raise of.wrong(key, f"{head_dim} at most")
    for name, values in factors.items():
        if len(values) != turned // 2:
            raise ValueError(f"its {name} has {len(values)} values, {turned // 2} were expected")
    found: dict[str, Any] = {"rope_theta": float(of.number("rope.freq_base", 10000.0))}
    if turned < head_dim:
        found["partial_rotary_factor"] = _share(turned, head_dim)
    return found | _scaling(of, found["rope_theta"], factors)


def llama3_factors(theta: float, dimensions: int, factor: float) -> npt.NDArray[np.float64]:
    """What llama3 scaling divides each of the `dimensions / 2` frequencies by (Llama 3.1's reference code)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dimensions, 2) / dimensions)
    smooth = np.clip((_ORIGINAL / wavelength - _LOW) / (_HIGH - _LOW), 0, 1)
    scaled: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return scaled


def _share(turned: int, head_dim: int) -> float:
    """The least factor that gives this many of a head, once it is cut to a whole number."""
    share = turned / head_dim
    return share if int(head_dim * share) == turned else math.nextafter(share, 1)


def _scaling(of: Description, theta: float, factors: Mapping[str, Factors]) -> dict[str, Any]:
    if LONG in factors or SHORT in factors:
        return _longrope(of, factors)
    frequencies = factors.get(FREQUENCIES)
    if frequencies is not None and (frequencies != 1).any():
        return _llama3(theta, frequencies)
    kind = of.said.get(_TYPE, "linear" if "rope.scale_linear" in of.said else "none")
    factor = float(of.number(_FACTOR, of.number("rope.scale_linear", 1.0)))
    if kind == "yarn":
        return _yarn(of, factor)
    if kind not in ("none", "linear"):
        raise of.wrong(_TYPE, "none, linear and yarn are followed")
    return {} if kind == "none" or factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _llama3(theta: float, factors: Factors) -> dict[str, Any]:
    scale = float(factors.max())
    if not np.allclose(factors, llama3_factors(theta, 2 * len(factors), scale), rtol=1e-4):
        raise ValueError(f"its {FREQUENCIES} is not that of Llama 3.1, which alone is understood")
    return {
        "rope_type": "llama3", "factor": scale, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }  # fmt: skip


def _longrope(of: Description, factors: Mapping[str, Factors]) -> dict[str, Any]:
    if not {LONG, SHORT} <= set(factors):
        raise ValueError(f"it has only one of {LONG} and {SHORT}")
    found: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": of.whole(_CONTEXT)}
    found |= {"long_factor": factors[LONG].tolist(), "short_factor": factors[SHORT].tolist()}
    if _ATTENTION in of.said:
        found["attention_factor"] = float(of.number(_ATTENTION))
    return found


def _yarn(of: Description, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies its `attn_factor` with the method's own (arXiv 2309.00071, section 3.4)."""
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = of.whole(_CONTEXT)
    found |= {key: float(of.number(said)) for key, said in _BETAS.items() if said in of.said}
    if _ATTENTION in of.said:
        found["attention_factor"] = float(of.number(_ATTENTION)) * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return found
