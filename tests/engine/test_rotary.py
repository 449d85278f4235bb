"""Rotary frequencies of every scaling are transformers' own, from the config transformers writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flashinfer.layout import find_layout, match_layout
from flashinfer.model.rotary import inverse_frequencies, rotary_tables
from tests.plain_checkpoint import LLAMA, llama_shapes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512},
    "yarn": YARN,
    "yarn-attention": YARN | {"attention_factor": 1.7, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.4, "truncate": False},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0 + i / 9 for i in range(16)],
                 "long_factor": [2.0 + i for i in range(16)], "original_max_position_embeddings": 512},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 5e5])
def test_as_transformers(name: str, theta: float) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"num_attention_heads": 2, "hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32}
    given = {**LLAMA, **sizes, "max_position_embeddings": 2048, "rope_scaling": None}
    config = LlamaConfig(**{**given, "rope_parameters": SCALINGS[name] | {"rope_theta": theta}})
    written = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
    shapes = llama_shapes({**given})
    rope = match_layout(find_layout(written, shapes), written, shapes).facts.rope
    assert rope is not None
    for context in (512, 2048):
        theirs = LlamaRotaryEmbedding(config)
        cos, sin = theirs(torch.zeros(1), torch.arange(context)[None])
        ours = rotary_tables(rope, context, context)
        np.testing.assert_allclose(inverse_frequencies(rope, context), theirs.inv_freq.numpy(), rtol=2e-6)
        for found, expected in zip(ours, (cos, sin), strict=True):
            np.testing.assert_allclose(found, expected[0, :, :16].numpy(), atol=1e-3)
