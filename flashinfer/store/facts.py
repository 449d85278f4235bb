"""What a decoder must know about a model beside its weights: plain facts, declared in the manifest."""

from __future__ import annotations

from typing import Literal

import msgspec

Activation = Literal["relu", "relu2", "silu", "gelu", "gelu_tanh", "gelu_quick"]

SPARSE_ACTIVATIONS: frozenset[str] = frozenset({"relu", "relu2"})
"""Activations that are exactly zero for every non-positive input."""


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary positions (arXiv 2104.09864), halves convention of transformers' llama.

    `llama3` scaling: low frequencies are divided by `factor`, high ones kept, a ramp between.
    `linear` scaling: every frequency is divided by `factor`.
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and arithmetic of a decoder. Sizes are counts of values.

    `position_offset` is added to a position before it indexes the learned table (OPT: 2).
    `final_norm`: whether the last layer's output is normed (not in post-norm models). `norm_affine`: whether
    norms have weights.
    `embed_size` differs from `hidden_size` where the family projects in and out (OPT-350m).
    """

    family: str
    vocab_size: int
    hidden_size: int
    embed_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_position: Literal["pre", "post"]
    activation: Activation
    gated: bool
    tied_head: bool
    rope: Rope | None = None
    position_offset: int = 0
    final_norm: bool = True
    norm_affine: bool = True

    @property
    def sparse(self) -> bool:
        """Whether the activation leaves neurons at exactly zero, so that they need not be read."""
        return self.activation in SPARSE_ACTIVATIONS

    @property
    def decision(self) -> Literal["gate", "up"]:
        """The FFN matrix whose product decides which neurons fire."""
        return "gate" if self.gated else "up"
