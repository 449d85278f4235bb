"""What is known of an architecture of GGUF files, and what no file may say unless it is followed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashinfer.checkpoint.gguf.forms import Form

if TYPE_CHECKING:
    from flashinfer.checkpoint.gguf.description import Description

Computed = Callable[["Description", Collection[str]], Any]


@dataclass(frozen=True)
class Architecture:
    """How a GGUF file of one `general.architecture` says what config.json would.

    Attributes:
        hugging_face: the architecture config.json would name; it leads to the layout.
        keys: config.json key -> metadata key, less the architecture's name in front. Those absent from the file are
            left out, so that the layout's default counts or it says what is missing.
        values: config.json key -> what holds for all files of the architecture and no metadata says.
        present: config.json key -> the tensor whose presence makes it true.
        absent: config.json key -> the tensor whose absence makes it true.
        computed: config.json key -> what gives its value, from what the file says and the names of its tensors.
        followed: keys of `NEUTRAL` that `computed` asks for.
        rope: whether positions are rotary.
        forms: tensors (`attn_q`, weight and bias; or `attn_norm.weight` alone) that are not laid out as Hugging Face's.
        stacked: what in a layout's tensor name counts the rows of one tensor of the file -> what stands there for all.
        fused: what in a layout's tensor name stands for several tensors of the file, of whose rows each expert has
            first the first one's -> what stands there for each.
        mixture: what the file is where it says `expert_count`.
    """

    hugging_face: str
    keys: Mapping[str, str]
    values: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    followed: tuple[str, ...] = ()
    rope: bool = True
    forms: Mapping[str, Form] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mixture: Architecture | None = None


NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attention.temperature_scale": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_gating_func": 1,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_shared_feed_forward_length": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1,
    "final_logit_softcapping": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "nextn_predict_layers": 0,
    "residual_scale": 1,
}
"""Metadata keys that change the arithmetic, and the value that changes nothing: any other is followed or refused."""
