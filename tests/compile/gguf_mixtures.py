"""A tiny mixture of experts of each architecture that has them: as `gguf_cases`, and what becomes of the experts.

llama.cpp's converter stacks the matrices of a layer's experts into one tensor of three axes, or, until early 2024,
wrote each as a tensor of its own. Granite's two fused ones it takes apart.
"""

from __future__ import annotations

from typing import Any

from tests.compile.gguf_cases import LLAMA_NAMES, PAIRS, RMS_EPS, ROPE, SIZES, THETA, WHOLE, Case

COUNT, USED, SIZE = 5, 2, 256
SAID: dict[str, Any] = {RMS_EPS: "rms_norm_eps", "expert_count": COUNT, "expert_used_count": USED}
EXPERTS: dict[str, Any] = {"num_experts": COUNT, "num_experts_per_tok": USED, "moe_intermediate_size": SIZE}
MIXTRAL: dict[str, Any] = SIZES | THETA | {"num_local_experts": COUNT, "num_experts_per_tok": USED}
MIXTRAL_NAMES = LLAMA_NAMES | {
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps", "block_sparse_moe.experts.w3": "ffn_up_exps",
}  # fmt: skip
APART_NAMES = LLAMA_NAMES | {
    "block_sparse_moe.gate": "ffn_gate_inp",
    **{f"block_sparse_moe.experts.{e}.{ours}": f"ffn_{theirs}.{e}"
       for e in range(COUNT) for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up"))},
}  # fmt: skip
QWEN_NAMES = LLAMA_NAMES | {
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
GRANITE_NAMES = LLAMA_NAMES | {
    "block_sparse_moe.router.layer": "ffn_gate_inp", "block_sparse_moe.gate_linear": "ffn_gate_exps",
    "block_sparse_moe.up_linear": "ffn_up_exps", "block_sparse_moe.output_linear": "ffn_down_exps",
}  # fmt: skip
MIXTURES: dict[str, Case] = {
    "mixtral": Case("llama", "mixtral", MIXTRAL, SAID | WHOLE, MIXTRAL_NAMES, PAIRS),
    "mixtral-apart": Case("llama", "mixtral", MIXTRAL, SAID | WHOLE, APART_NAMES, PAIRS, experts_apart=True),
    "qwen2moe": Case(
        "qwen2moe", "qwen2_moe", SIZES | EXPERTS | {"shared_expert_intermediate_size": 768},
        SAID | ROPE | {"expert_feed_forward_length": SIZE, "expert_shared_feed_forward_length": 768}, QWEN_NAMES,
        {"shared_expert_gate": lambda values, _: values.reshape(-1)},
    ),
    "qwen2moe-old": Case(
        "qwen2moe", "qwen2_moe", SIZES | EXPERTS | {"shared_expert_intermediate_size": 512, "qkv_bias": False},
        SAID | ROPE, QWEN_NAMES, {"shared_expert_gate": lambda values, _: values.reshape(-1)},
    ),
    "qwen3moe": Case(
        "qwen3moe", "qwen3_moe", SIZES | EXPERTS | {"head_dim": 128, "norm_topk_prob": True},
        SAID | ROPE | {"attention.key_length": 128, "attention.value_length": 128, "expert_feed_forward_length": SIZE},
        QWEN_NAMES,
    ),
    "olmoe": Case(
        "olmoe", "olmoe", SIZES | {"num_key_value_heads": 4, "num_experts": COUNT, "num_experts_per_tok": USED},
        SAID | ROPE, QWEN_NAMES,
    ),
    "granitemoe": Case(
        "granitemoe", "granitemoe",
        MIXTRAL | {"embedding_multiplier": 12.0, "logits_scaling": 7.0, "residual_multiplier": 0.22,
                   "attention_multiplier": 0.15},
        SAID | WHOLE | {"attention.scale": 0.15, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 7.0},
        GRANITE_NAMES, PAIRS,
    ),
}  # fmt: skip
