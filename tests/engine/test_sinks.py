"""Attention sinks from a checkpoint to logits: a llama with the attention that gpt-oss has in transformers."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.llama import modeling_llama

from flashinfer import pack
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.layout.read import parse_layout
from tests.checkpoints import LLAMA_CONFIG, make_llama

LAYOUT = Path(__file__).parents[2] / "layouts" / "llama.toml"
TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 96, 40)]
SINKS = np.random.default_rng(8).normal(1.0, 2.0, (LLAMA_CONFIG["num_hidden_layers"], 4)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_llama(tmp_path_factory.mktemp("sinks") / "checkpoint")
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.sinks": torch.from_numpy(s.copy()) for i, s in enumerate(SINKS)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    table: dict[str, Any] = tomllib.loads(LAYOUT.read_text())
    table["facts"]["sinks"] = True
    name = "{prefix}layers.{i}.self_attn.sinks"
    table["tensors"]["layers.{i}.attn.sinks"] = {"name": name, "shape": ["num_heads"]}
    pack(checkpoint, checkpoint.parent / "store", layout=parse_layout(table, "llama with sinks"))
    return checkpoint.parent / "store"


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_logits_are_those_of_gpt_oss_attention(checkpoint: Path, store: Path, backend: Any, monkeypatch) -> None:
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    oracle = LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    for layer, sinks in zip(oracle.model.layers, SINKS, strict=True):
        layer.self_attn.sinks = torch.nn.Parameter(torch.from_numpy(sinks))
    with torch.no_grad():
        expected = oracle(torch.tensor([TOKENS])).logits[0].numpy()
    with Model.open(store, run=RunConfig(backend=backend)) as model:
        assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4
        session = model.session()
        steps = np.stack([model.step(session, [t]) for t in TOKENS])
    assert np.abs(steps - expected).max() <= 1e-4


@pytest.mark.parametrize(("kv_type", "near"), [("f16", 5e-3), ("int8", 1e-1)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_with_rounded_keys_and_values(store: Path, backend: Any, kv_type: Any, near: float) -> None:
    found = []
    for kind in ("f32", kv_type):
        with Model.open(store, run=RunConfig(backend=backend, kv_type=kind)) as model:
            found.append(model.logits(model.session(), TOKENS))
    assert 0 < np.abs(found[1] - found[0]).max() <= near
