"""Logits agree with transformers on every variant of both families."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashinfer.engine import Model
from tests.dense_oracle import dense_logits
from tests.engine.variants import VARIANTS

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 96, 40)]


def reference(path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(packed, variant: str) -> None:
    p = packed(variant)
    with torch.no_grad():
        expected = reference(p.checkpoint)(torch.tensor([TOKENS])).logits[0].numpy()
    with Model.open(p.store) as model:
        prefill = model.logits(model.session(), TOKENS)
        session = model.session()
        decode = np.stack([model.step(session, [t]) for t in TOKENS])
    assert np.abs(prefill - expected).max() <= 1e-4
    assert np.abs(decode - expected).max() <= 1e-4
    assert np.abs(decode - prefill).max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "llama-biases", "opt", "opt-projections"])
def test_half_precision_equals_transformers_on_upcast_weights(packed, variant: str, dtype: str) -> None:
    p = packed(variant, dtype)
    with torch.no_grad():
        expected = reference(p.checkpoint)(torch.tensor([TOKENS])).logits[0].numpy()
    with Model.open(p.store) as model:
        assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4


@pytest.mark.parametrize("variant", ["llama", "llama-silu", "opt"])
def test_greedy_tokens_equal_transformers(packed, variant: str) -> None:
    p = packed(variant)
    oracle, ids = reference(p.checkpoint), list(TOKENS[:8])
    with Model.open(p.store) as model, torch.no_grad():
        session = model.session()
        logits = model.step(session, ids)
        for _ in range(64):
            ids.append(int(np.argmax(logits)))
            logits = model.step(session, [ids[-1]])
        again = list(TOKENS[:8])
        for _ in range(64):
            again.append(int(oracle(torch.tensor([again])).logits[0, -1].argmax()))
    assert ids == again


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "opt"])
def test_dense_oracle_without_selection(packed, variant: str) -> None:
    p = packed(variant)
    with Model.open(p.store) as model:
        ours = model.logits(model.session(), TOKENS)
        expected = dense_logits(p.checkpoint, model.facts, TOKENS)
    assert np.abs(ours - expected).max() <= 1e-5
