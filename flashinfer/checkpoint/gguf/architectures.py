"""The architectures of GGUF files that are read, as data; one more is an entry here and a layout (`docs/layouts.md`).

Tensor names need no table: the `gguf` library knows GGUF's name for each name a layout gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How a GGUF file of one `general.architecture` says what config.json would.

    Attributes:
        hugging_face: the architecture config.json would name; it leads to the layout.
        keys: config.json key -> metadata key, less the architecture's name in front. Those absent from the file are
            left out, so that the layout's default counts or it says what is missing.
        values: config.json key -> what holds for all files of the architecture and no metadata says.
        present: config.json key -> the tensor whose presence makes it true.
        refused: metadata keys that change the arithmetic, and the one value that is followed.
        rope: rotary positions, with theta, scaling and the dimensions they turn.
        interleaved: tensors whose rows llama.cpp has reordered within each head, from (first half, second half) to
            pairs, -> the config.json key of how many heads they have.
    """

    hugging_face: str
    keys: Mapping[str, str]
    values: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)
    rope: bool = True
    interleaved: Mapping[str, str] = field(default_factory=dict)


_LLAMA_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""The names that llama's config.json and those of its many descendants share."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        hugging_face="LlamaForCausalLM",
        keys=_LLAMA_KEYS,
        values={"hidden_act": "silu"},
        present={"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
        refused={"expert_count": 0, "attention.sliding_window": 0},
        interleaved={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
}
