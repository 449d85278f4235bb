"""Logits and greedy tokens of every family agree with transformers, with all memory and at the floor."""

from __future__ import annotations

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
from tests.families import CASES, CONTEXT, make

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


@cache
def reference(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def expected_logits(checkpoint: Path, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(checkpoint)(torch.tensor([tokens])).logits[0].numpy()


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
        assert np.abs(model.logits(model.session(), PROMPT) - expected_logits(checkpoint, PROMPT)).max() <= 1e-4
        session, tokens = model.session(), list(PROMPT)
        logits = [model.step(session, tokens)]
        for _ in range(GREEDY):
            tokens.append(int(np.argmax(logits[-1])))
            logits.append(model.step(session, [tokens[-1]]))
    # one pass over the whole text says what its every step gives, and so which token is greedy there
    expected = expected_logits(checkpoint, tokens)[len(PROMPT) - 1 :]
    assert tokens[len(PROMPT) :] == [int(t) for t in expected[:-1].argmax(-1)]
    assert np.abs(np.stack(logits) - expected).max() <= 1e-4


FACTS = {
    "mistral-window": {"window": 80},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "width", "norm_position": "output"},
    "granite": {"embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.15, "logit_scale": 1 / 7},
    "cohere-qk-norm": {"qk_norm": "heads", "parallel": True, "logit_scale": 0.5},
    "stablelm-12b": {"qk_norm": "heads", "parallel": True},
    "persimmon": {"qk_norm": "head", "activation": "relu2", "sparse": True},
    "nemotron": {"activation": "relu2", "gated": False, "sparse": True},
}


@pytest.mark.parametrize("case", FACTS)
def test_facts(made, case: str) -> None:
    with Model.open(made(case)[1]) as model:
        assert {name: getattr(model.facts, name) for name in FACTS[case]} == FACTS[case]
        assert model.facts.context_length == (model.facts.window or CONTEXT)


WRONG: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": "none"},
    "olmo2": {"norm_position": "pre"},
    "granite": {"attention_scale": None},
    "gpt_neox": {"parallel": False},
    "cohere-qk-norm": {"qk_norm": "none"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fact_shows(made, case: str) -> None:
    """The comparison above can fail: with one fact changed logits are others."""
    checkpoint, store = made(case)
    with Model.open(store) as model:
        facts = msgspec.structs.replace(model.facts, **WRONG[case])
        model._decoder.facts = model._decoder._heads._facts = facts
        assert np.abs(model.logits(model.session(), PROMPT) - expected_logits(checkpoint, PROMPT)).max() > 1e-3


def test_layers_without_rotary_positions(made) -> None:
    with Model.open(made("smollm3")[1]) as model:
        assert model.facts.rope is not None
        assert model.facts.rope.skipped == (1,)


def test_longrope_keeps_short_factors_in_a_short_context(made) -> None:
    """transformers chooses by the length of each call, a run here by its context, once."""
    checkpoint, store = made("phi3-longrope")
    with Model.open(store, context=32) as model:
        logits = model.logits(model.session(), PROMPT[:32])
    assert np.abs(logits - expected_logits(checkpoint, PROMPT[:32])).max() <= 1e-4
