"""The checkpoint variants both families come in: name -> (family, config overrides)."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-odd-sizes": ("llama", {"intermediate_size": 149, "vocab_size": 101}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-relu2": ("llama", {"hidden_act": "relu2"}),
    "llama-silu": ("llama", {"hidden_act": "silu"}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-gelu-new": ("llama", {"hidden_act": "gelu_new"}),
    "llama-quick-gelu": ("llama", {"hidden_act": "quick_gelu"}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "opt": ("opt", {}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt-projections": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
    "opt-plain-norms": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-gelu": ("opt", {"activation_function": "gelu"}),
}
