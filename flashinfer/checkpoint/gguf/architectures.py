"""The architectures of GGUF files that are read, as data; one more is an entry here and a layout (`docs/layouts.md`).

Tensor names need no table: the `gguf` library knows GGUF's name for each name a layout gives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flashinfer.checkpoint.gguf.architecture import Architecture, Computed
from flashinfer.checkpoint.gguf.forms import Form, head_by_head, keys_in_halves, queries_in_halves

if TYPE_CHECKING:
    from flashinfer.checkpoint.gguf.description import Description

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""The names that most config.json share."""
_GPT_SIZES = {
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
}
_RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_LAYER = "attention.layer_norm_epsilon"
_PAIRS = {"attn_q": Form(queries_in_halves), "attn_k": Form(keys_in_halves)}
"""llama.cpp's kind of rotary positions turns neighbours: llama and those that came after it in its converter."""
_TRANSPOSED = Form(transposed=True)
_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_QKV_BIAS = "blk.0.attn_q.bias"
_ONE_MORE = Form(plus_one=True)
_NORMS = dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "output_norm.weight"), _ONE_MORE)
_GEMMA_NORMS = _NORMS | dict.fromkeys(
    ("attn_q_norm.weight", "attn_k_norm.weight", "post_attention_norm.weight", "post_ffw_norm.weight"), _ONE_MORE
)
_GEMMA_KEYS = _SIZES | _RMS | {"final_logit_softcapping": "final_logit_softcapping"}
_GRANITE_KEYS = _SIZES | _RMS | {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale", "residual_multiplier": "residual_scale",
}  # fmt: skip
_WINDOW = "attention.sliding_window"
_EXPERTS: dict[str, Computed] = {
    "num_experts": lambda of, _: of.whole("expert_count"),
    "num_experts_per_tok": lambda of, _: of.whole("expert_used_count"),
}
_SIZE, _SHARED_SIZE = "expert_feed_forward_length", "expert_shared_feed_forward_length"
_NORMALISED = {"norm_topk_prob": "expert_weights_norm"}


def _expert_size(of: Description, _: Collection[str]) -> int:
    """Neurons of an expert; files older than the key are of models whose experts make up a dense layer."""
    return of.whole(_SIZE) if _SIZE in of.said else of.whole("feed_forward_length") // of.whole("expert_used_count")


def _query_scalar(largest: int) -> Computed:
    """What Gemma scales queries by: a head's size; in the model of that many layers, as if heads filled the width."""
    return lambda of, _: of.whole("embedding_length") // of.heads.queries if of.layers == largest else of.head_dim


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        _SIZES | _RMS,
        present=_BIASES,
        forms=_PAIRS,
        mixture=Architecture(
            "MixtralForCausalLM", _SIZES | _RMS, computed=_EXPERTS, followed=("expert_count",), forms=_PAIRS
        ),
    ),
    "arcee": Architecture("ArceeForCausalLM", _SIZES | _RMS, present=_BIASES, forms=_PAIRS),
    "bloom": Architecture(
        "BloomForCausalLM",
        {
            "hidden_size": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count",
            "seq_length": "context_length", "layer_norm_epsilon": _LAYER,
        },
        rope=False,
        forms={"attn_qkv": Form(head_by_head)},
    ),
    "command-r": Architecture(
        "CohereForCausalLM",
        _SIZES | {"layer_norm_eps": _LAYER, "logit_scale": "logit_scale"},
        present={"attention_bias": _QKV_BIAS, "use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        {
            "hidden_size": "embedding_length", "ffn_hidden_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "num_kv_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
            "layer_norm_epsilon": _LAYER,
        },
        present={"bias": "blk.0.attn_qkv.bias"},
        computed={
            "new_decoder_architecture": lambda of, _: of.heads.keys > 1,
            "num_ln_in_parallel_attn": lambda _, tensors: 2 if "blk.0.attn_norm_2.weight" in tensors else 1,
        },
        forms={"attn_qkv": Form(head_by_head)},
    ),
    "gemma": Architecture("GemmaForCausalLM", _SIZES | _RMS, forms=_NORMS),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        _GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping", "sliding_window": _WINDOW},
        computed={"query_pre_attn_scalar": _query_scalar(46)},
        forms=_GEMMA_NORMS,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        _GEMMA_KEYS | {"rope_local_base_freq": "rope.freq_base_swa"},
        computed={
            "query_pre_attn_scalar": _query_scalar(62),
            "sliding_window": lambda of, _: of.whole(_WINDOW) if _WINDOW in of.said else None,
        },
        followed=(_WINDOW,),
        forms=_GEMMA_NORMS,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        _GPT_SIZES | {"layer_norm_epsilon": _LAYER},
        rope=False,
        forms=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _TRANSPOSED),
    ),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM",
        _SIZES | {"layer_norm_eps": _LAYER, "use_parallel_residual": "use_parallel_residual"},
        present={"attention_bias": "blk.0.attn_qkv.bias"},
        forms={"attn_qkv": Form(head_by_head)},
    ),
    "granite": Architecture(
        "GraniteForCausalLM",
        _GRANITE_KEYS,
        present=_BIASES,
        forms=_PAIRS,
    ),
    "granitemoe": Architecture(
        "GraniteMoeForCausalLM",
        _GRANITE_KEYS,
        present={"attention_bias": _QKV_BIAS},
        computed=_EXPERTS,
        followed=("expert_count",),
        forms=_PAIRS,
        fused={"input_linear": ("experts.w1", "experts.w3")},
    ),
    "minicpm": Architecture(
        "MiniCPMForCausalLM",
        _SIZES | _RMS,
        present=_BIASES,
        computed={
            "scale_emb": lambda of, _: of.number("embedding_scale", 12.0),
            "scale_depth": lambda of, _: of.number("residual_scale", 1.4 * of.layers**-0.5) * of.layers**0.5,
            "dim_model_base": lambda of, _: (
                of.whole("embedding_length") / of.number("logit_scale", of.whole("embedding_length") / 256)
            ),
        },
        followed=("embedding_scale", "residual_scale", "logit_scale"),
        forms=_PAIRS,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        {
            "d_model": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
            "max_seq_len": "context_length", "layer_norm_epsilon": _LAYER,
        },
        computed={"attn_config": lambda of, _: {"alibi_bias_max": of.number("attention.max_alibi_bias")}},
        followed=("attention.max_alibi_bias",),
        rope=False,
    ),
    "nemotron": Architecture(
        "NemotronForCausalLM",
        _SIZES | {"norm_eps": _LAYER},
        present=_BIASES,
        forms=_NORMS,
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", _SIZES | _RMS, present={"attention_bias": _QKV_BIAS}),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        _SIZES | _RMS | _NORMALISED,
        values={"norm_topk_prob": False},
        computed=_EXPERTS,
        followed=("expert_count",),
    ),
    "phi2": Architecture("PhiForCausalLM", _SIZES | {"layer_norm_eps": _LAYER}),
    "phi3": Architecture("Phi3ForCausalLM", _SIZES | _RMS | {"sliding_window": _WINDOW}),
    "qwen2": Architecture("Qwen2ForCausalLM", _SIZES | _RMS),
    "qwen3": Architecture("Qwen3ForCausalLM", _SIZES | _RMS, present={"attention_bias": _QKV_BIAS}),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        _SIZES | _RMS | _NORMALISED,
        values={"norm_topk_prob": False},
        present={"qkv_bias": _QKV_BIAS},
        computed=_EXPERTS | {
            "moe_intermediate_size": _expert_size,
            "shared_expert_intermediate_size": lambda of, _: of.whole(_SHARED_SIZE, of.whole("feed_forward_length")),
        },
        followed=("expert_count", _SHARED_SIZE),
        forms={"ffn_gate_inp_shexp": Form(one_row=True)},
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        _SIZES | _RMS | _NORMALISED,
        values={"norm_topk_prob": True},
        present={"attention_bias": _QKV_BIAS},
        computed=_EXPERTS | {"moe_intermediate_size": _expert_size},
        followed=("expert_count",),
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", _SIZES | _RMS, present=_BIASES, forms=_PAIRS),
    "stablelm": Architecture(
        "StableLmForCausalLM",
        _SIZES | {"layer_norm_eps": _LAYER},
        present={"use_qkv_bias": _QKV_BIAS, "qk_layernorm": "blk.0.attn_q_norm.weight"},
        absent={"use_parallel_residual": "blk.0.ffn_norm.weight"},
        stacked={".norms.{h}": ""},
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM",
        _SIZES | {"norm_epsilon": _LAYER},
        values={"sliding_window": 4096},  # of all three that were released
        present={"use_bias": _QKV_BIAS},
    ),
}  # fmt: skip
"""By `general.architecture`."""
