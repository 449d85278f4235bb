"""Logits and greedy tokens of every family agree with transformers, with all memory and at the floor."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.config import Cap
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.model.scoring import scoring_of
from flashinfer.store import Experts
from flashinfer.store.facts import Latent
from tests import families
from tests.families import CASES, CONTEXT, FAT, make

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 89, 40)]
GREEDY = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """`made(case)`: its checkpoint and the store packed from it, made once."""

    @cache
    def get(name: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(name)
        pack(make(name, root / "checkpoint"), root / "store")
        return root / "checkpoint", root / "store"

    return get


reference = cache(families.reference)


def expected_logits(case: str, checkpoint: Path, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(case, checkpoint)(torch.tensor([tokens])).logits[0].numpy()


@cache
def floor_of(store: Path) -> int:
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1))
    return e.value.floor


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", ["all", "floor"])
def test_agrees_with_transformers(made, case: str, share: str) -> None:
    checkpoint, store = made(case)
    cap = Cap(weight_memory=floor_of(store)) if share == "floor" else Cap()
    with Model.open(store, cap) as model:
        assert np.abs(model.logits(model.session(), PROMPT) - expected_logits(case, checkpoint, PROMPT)).max() <= 1e-4
        session, tokens = model.session(), list(PROMPT)
        logits = [model.step(session, tokens)]
        for _ in range(GREEDY):
            tokens.append(int(np.argmax(logits[-1])))
            logits.append(model.step(session, [tokens[-1]]))
    # one pass over the whole text says what its every step gives, and so which token is greedy there
    expected = expected_logits(case, checkpoint, tokens)[len(PROMPT) - 1 :]
    assert tokens[len(PROMPT) :] == [int(t) for t in expected[:-1].argmax(-1)]
    assert np.abs(np.stack(logits) - expected).max() <= 1e-4


FACTS = {
    "mistral-window": {"window": 24, "global_layers": ()},
    "qwen2-window": {"window": 24, "global_layers": (0,)},
    "gemma2": {
        "window": 24,
        "global_layers": (1,),
        "attention_softcap": 0.8,
        "logit_softcap": 3.0,
        "norm_position": "both",
        "embed_scale": float(np.float32(40**0.5)),
        "attention_scale": 7**-0.5,
    },
    "gemma3": {"window": 24, "global_layers": (1,), "qk_norm": "head", "norm_position": "both"},
    "falcon-7b": {"num_kv_heads": 1, "parallel": True, "sparse": True},
    "falcon-40b": {"num_kv_heads": 2, "parallel": True, "alibi": 0.0},
    "falcon-rw": {"num_kv_heads": 4, "parallel": False, "alibi": 8.0, "alibi_scaled": True, "rope": None},
    "minicpm": {"embed_scale": 12.0, "residual_scale": 1.4 * 3**-0.5, "logit_scale": 16 / 40, "fires_above": FAT},
    "bamboo": {"activation": "drelu", "window": 24, "sparse": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "width", "norm_position": "output"},
    "granite": {"embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.15, "logit_scale": 1 / 7},
    "cohere-qk-norm": {"qk_norm": "heads", "parallel": True, "logit_scale": 0.5},
    "stablelm-12b": {"qk_norm": "heads", "parallel": True},
    "persimmon": {"qk_norm": "head", "activation": "relu2", "sparse": True},
    "nemotron": {"activation": "relu2", "gated": False, "sparse": True},
    "mixtral": {"experts": Experts(6, 2, 107, normalised=True)},
    "qwen2_moe": {"experts": Experts(6, 2, 24, shared_size=32, shared_gate=True)},
    "qwen2_moe-mixed": {"experts": Experts(6, 2, 24, shared_size=36, shared_gate=True, normalised=True, dense=(0, 2))},
    "qwen3_moe-mixed": {"experts": Experts(6, 2, 24, dense=(1,))},
    "granitemoe": {"experts": Experts(6, 2, 107, normalised=True), "residual_scale": 0.22},
    "gpt_oss": {
        "experts": Experts(6, 2, 107, normalised=True),
        "activation": "swiglu_oai",
        "sinks": True,
        "window": 24,
        "global_layers": (1,),
    },
    "deepseek_v2": {
        "experts": Experts(8, 3, 24, shared_size=48, scale=1.5, groups=4, top_groups=2, dense=(0,)),
        "latent": Latent(kv_rank=20, nope_dim=10, rope_dim=6, value_dim=14, q_rank=24),
        "attention_scale": None,
        "value_dim": 14,
    },
    "deepseek_v2-lite": {
        "experts": Experts(6, 2, 24, shared_size=24),
        "latent": Latent(kv_rank=20, nope_dim=10, rope_dim=6, value_dim=14),
        "attention_scale": 0.25 * (0.1 * 0.707 * math.log(4) + 1) ** 2,
    },
    "deepseek_v3": {
        "experts": Experts(
            8,
            3,
            24,
            shared_size=24,
            scoring="sigmoid",
            normalised=True,
            scale=2.5,
            groups=4,
            top_groups=2,
            dense=(0, 1),
        ),
        "head_dim": 16,
        "num_kv_heads": 4,
    },
}


@pytest.mark.parametrize("case", FACTS)
def test_facts(made, case: str) -> None:
    with Model.open(made(case)[1]) as model:
        assert {name: getattr(model.facts, name) for name in FACTS[case]} == FACTS[case]
        assert model.facts.context_length == CONTEXT


WRONG: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": "none"},
    "olmo2": {"norm_position": "pre"},
    "granite": {"attention_scale": None},
    "gpt_neox": {"parallel": False},
    "cohere-qk-norm": {"qk_norm": "none"},
    "mistral-window": {"window": None},
    "qwen2-window": {"global_layers": ()},
    "gemma": {"embed_scale": 1.0},
    "gemma2": {"attention_softcap": None},
    "gemma3": {"local_rope": None},
    "mpt": {"alibi": 4.0},
    "bloom": {"embed_norm": False},
    "falcon-rw": {"alibi_scaled": False},
    "llama-fatrelu": {"fires_above": 0.0},
    "bamboo": {"window": None},
    "deepseek_v3": {"attention_scale": None},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fact_shows(made, case: str) -> None:
    """The comparison above can fail: with one fact changed logits are others."""
    checkpoint, store = made(case)
    with Model.open(store) as model:
        facts = msgspec.structs.replace(model.facts, **WRONG[case])
        model._decoder.facts = model._decoder._heads._facts = facts
        model._decoder._scoring = [scoring_of(facts, i) for i in range(facts.num_layers)]
        assert np.abs(model.logits(model.session(), PROMPT) - expected_logits(case, checkpoint, PROMPT)).max() > 1e-3


def test_layers_without_rotary_positions(made) -> None:
    with Model.open(made("smollm3")[1]) as model:
        assert model.facts.rope is not None
        assert model.facts.rope.skipped == (1,)


def test_longrope_keeps_short_factors_in_a_short_context(made) -> None:
    """transformers chooses by the length of each call, a run here by its context, once."""
    checkpoint, store = made(case := "phi3-longrope")
    with Model.open(store, context=32) as model:
        logits = model.logits(model.session(), PROMPT[:32])
    assert np.abs(logits - expected_logits(case, checkpoint, PROMPT[:32])).max() <= 1e-4
