"""LoRA at run time on families that keep their matrices, or take their products, in another way than llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.adapter import read_adapter
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.store import open_store
from tests.adapters import ATTENTION, TOKENS, made_by_peft
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
        assert open_store(store).manifest.facts.rectifies_up
        for backend in BACKENDS:
            assert np.abs(logits(store, tmp_path / "adapter", backend=backend) - expected).max() <= 1e-4
        floor = Cap(weight_memory=floor_of(store, tmp_path / "adapter"))
        with Model.open(store, floor, context=64, run=RunConfig(adapter=tmp_path / "adapter")) as model:
            assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4
    assert np.abs(logits(store, None) - expected).max() > 1e-2


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
