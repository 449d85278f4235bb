"""LoRA at run time on families that keep their matrices, or take their products, in another way than llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.adapter import read_adapter
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError
from flashinfer.store import open_store
from tests.adapters import ATTENTION, TOKENS, by_hand, made_by_peft
from tests.checkpoints import save
from tests.engine.test_adapter import BACKENDS, FFN, floor_of, logits
from tests.families import make as make_family
from tests.families import reference
from tests.quantised_checkpoints import gptq, quantised

FUSED = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gptj": ["q_proj", "k_proj", "v_proj", "fc_in", "fc_out"],
    "cohere": ["q_proj", "k_proj", "gate_proj", "down_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
"""Families whose checkpoints hold several roles in one tensor, transposed, or with rotary pairs side by side."""


@pytest.mark.parametrize("family", FUSED)
def test_parts_of_a_matrix(tmp_path: Path, family: str) -> None:
    base = make_family(family, tmp_path / "base")
    pack(base, tmp_path / "store")
    config = {"r": 3, "lora_alpha": 3, "target_modules": FUSED[family], "fan_in_fan_out": family == "gpt2"}
    expected = made_by_peft(base, tmp_path / "adapter", **config)
    assert np.abs(logits(tmp_path / "store", tmp_path / "adapter") - expected).max() <= 1e-4
    assert np.abs(logits(tmp_path / "store", None) - expected).max() > 1e-2


@pytest.mark.parametrize("modules", [["up_proj"], ["down_proj"], [*ATTENTION, *FFN]])
def test_products_of_up_that_are_rectified(tmp_path: Path, modules: list[str]) -> None:
    """dReLU takes what is positive of up's product with what the adapter adds to it."""
    base = make_family("bamboo", tmp_path / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": modules}
    expected = made_by_peft(base, tmp_path / "adapter", model=reference("bamboo", base), **config)
    pack(base, tmp_path / "merged", merge_adapter=tmp_path / "adapter")
    assert np.abs(logits(tmp_path / "merged", None) - expected).max() <= 1e-4
    for decision in ("separate", "bundled"):
        store = tmp_path / decision
        pack(base, store, decision=decision)  # type: ignore[arg-type]
        assert open_store(store).manifest.facts.up_activation == "relu"
        for backend in BACKENDS:
            assert np.abs(logits(store, tmp_path / "adapter", backend=backend) - expected).max() <= 1e-4
        floor = Cap(weight_memory=floor_of(store, tmp_path / "adapter"))
        with Model.open(store, floor, context=64, run=RunConfig(adapter=tmp_path / "adapter")) as model:
            assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4
    assert np.abs(logits(store, None) - expected).max() > 1e-2


ROUTED = "model.layers.0."
MIXTURES = {
    "qwen3_moe-mixed": {"self_attn.q_proj": (40, 40), "mlp.gate": (6, 40)},
    "qwen2_moe": {"mlp.gate": (6, 40), "mlp.shared_expert_gate": (1, 40)},
    "mixtral": {"self_attn.v_proj": (20, 40), "block_sparse_moe.gate": (6, 40)},
    "granitemoe": {"block_sparse_moe.router.layer": (6, 40)},
}
"""Matrices `[out, in]` of a layer of experts that are not an expert's own."""


def adapter_for(root: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """An adapter of rank 2 for these modules."""
    tensors, random = {}, np.random.default_rng(1)
    for name, (out, size) in shapes.items():
        for part, shape in (("A", (2, size)), ("B", (out, 2))):
            values = random.normal(0, 0.5, shape).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    return by_hand(root, tensors)


@pytest.mark.parametrize("family", MIXTURES)
def test_beside_experts(tmp_path: Path, family: str) -> None:
    """Attention, dense layers between and routers, which then choose other experts: as the merged model."""
    base = make_family(family, tmp_path / "base")
    shapes = {f"{ROUTED}{name}": shape for name, shape in MIXTURES[family].items()}
    if family == "qwen3_moe-mixed":
        dense = {"gate_proj": (107, 40), "up_proj": (107, 40), "down_proj": (40, 107)}
        shapes |= {f"model.layers.1.mlp.{name}": shape for name, shape in dense.items()}
    adapter = adapter_for(tmp_path / "adapter", shapes)
    pack(base, tmp_path / "store")
    pack(base, tmp_path / "merged", merge_adapter=adapter)
    expected = logits(tmp_path / "merged", None)
    for backend in BACKENDS:
        assert np.abs(logits(tmp_path / "store", adapter, backend=backend) - expected).max() <= 1e-4
    assert np.abs(logits(tmp_path / "store", None) - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("mixtral", "block_sparse_moe.experts.4.w1", (107, 40)),
        ("qwen2_moe", "mlp.shared_expert.up_proj", (32, 40)),
        ("granitemoe", "block_sparse_moe.input_linear", (214, 40)),
    ],
)
def test_on_experts_it_is_refused(tmp_path: Path, family: str, name: str, shape: tuple[int, int]) -> None:
    pack(make_family(family, tmp_path / "base"), tmp_path / "store")
    adapter = adapter_for(tmp_path / "adapter", {f"{ROUTED}{name}": shape})
    with pytest.raises(CheckpointError, match=r"is one of experts, which is not done at run time; merge it"):
        Model.open(tmp_path / "store", run=RunConfig(adapter=adapter))


def test_parts_of_a_matrix_whose_codes_were_kept(tmp_path: Path) -> None:
    """config.json in the store still says how the checkpoint was quantised: which rows are whose, it says as ever."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("phi3", vocab_size=89, num_hidden_layers=2, pad_token_id=0, **sizes)
    base = save(AutoModelForCausalLM.from_config, config, tmp_path / "base")
    quantised(base, tmp_path / "gptq", tmp_path / "dequantised", gptq(32))
    made_by_peft(tmp_path / "dequantised", tmp_path / "adapter", r=3, target_modules=FUSED["phi3"])
    found = []
    for name in ("gptq", "dequantised"):
        pack(tmp_path / name, tmp_path / f"{name}.flash")
        found.append(dict(read_adapter(tmp_path / "adapter", open_store(tmp_path / f"{name}.flash")).changes()))
    assert found[0].keys() == found[1].keys()
    for role, change in found[0].items():
        assert (change.a.raw == found[1][role].a.raw).all()
        assert (change.b.raw == found[1][role].b.raw).all()
