"""Tiny random-weights checkpoints, written by transformers itself: what every test packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LLAMA_CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT_CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "activation_function": "relu",
    "dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}


def make_llama(
    path: Path, *, dtype: str = "float32", seed: int = 0, max_shard_size: str = "50GB", **config_overrides: Any
) -> Path:
    """A LlamaForCausalLM checkpoint under `path`: hidden 48, FFN 160, 3 layers, 96 words, unless overridden.

    `config_overrides` are LlamaConfig fields; `dtype` is a torch dtype's name. Returns `path`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return save(
        LlamaForCausalLM, LlamaConfig(**{**LLAMA_CONFIG, **config_overrides}), path, dtype, seed, max_shard_size
    )


def make_opt(
    path: Path, *, dtype: str = "float32", seed: int = 0, max_shard_size: str = "50GB", **config_overrides: Any
) -> Path:
    """An OPTForCausalLM checkpoint under `path`, of the same size as `make_llama`'s. Returns `path`."""
    from transformers import OPTConfig, OPTForCausalLM

    return save(OPTForCausalLM, OPTConfig(**{**OPT_CONFIG, **config_overrides}), path, dtype, seed, max_shard_size)


def save(
    make: Any, config: Any, path: Path, dtype: str = "float32", seed: int = 0, max_shard_size: str = "50GB"
) -> Path:
    """Write the checkpoint of the model that `make(config)` gives, with random weights, under `path`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _fill(name, parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.uniform_(-0.3, 0.3)
    path.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size, safe_serialization=True)
    return path


def _fill(name: str, parameter: Any) -> None:
    """Biases that are not zero and norms that are not one, so that a swapped or forgotten one shows."""
    if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
        parameter.uniform_(0.5, 1.5)
    elif parameter.dim() == 1:
        parameter.uniform_(-0.1, 0.1)
    else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
