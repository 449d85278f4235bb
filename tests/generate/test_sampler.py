"""The sampler draws from the distribution transformers would draw from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashinfer.config import SamplingConfig
from flashinfer.errors import FlashInferError
from flashinfer.generate import Sampler, check_sampling

VOCAB = 200
HISTORY = [3, 3, 17, 199, 5]


def logits_of(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def reference(config: SamplingConfig, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Probabilities by transformers' own processors, in the order `generate` puts them."""
    import torch
    from transformers.generation import logits_process as lp

    steps: list[Any] = []
    if config.repetition_penalty != 1:
        steps.append(lp.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1:
        steps.append(lp.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(lp.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(lp.TopPLogitsWarper(config.top_p))
    if config.min_p > 0:
        steps.append(lp.MinPLogitsWarper(config.min_p))
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.tensor([HISTORY]), scores)
    return torch.softmax(scores, -1)[0].numpy()


CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.3, top_k=10),
    SamplingConfig(temperature=0.8, top_k=1000),
    SamplingConfig(temperature=1.0, top_p=0.9),
    SamplingConfig(temperature=1.0, top_p=0.01),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=1.0, repetition_penalty=1.8),
    SamplingConfig(temperature=0.6, repetition_penalty=0.7),
    SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_probabilities_are_those_of_transformers(config: SamplingConfig) -> None:
    for seed in range(10):
        logits = logits_of(seed)
        ours, theirs = Sampler(config).probabilities(logits, HISTORY), reference(config, logits)
        assert ((ours > 0) == (theirs > 0)).all()
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9)


def test_tokens_equal_to_the_last_of_the_top_k_stay() -> None:
    logits = np.array([1, 2, 2, 0], dtype=np.float32)
    assert (Sampler(SamplingConfig(temperature=1, top_k=1)).probabilities(logits, []) > 0).tolist() == [0, 1, 1, 0]


def test_greedy_takes_the_lowest_of_equals_after_the_penalty() -> None:
    logits = np.array([0, 4, 3, 3], dtype=np.float32)
    assert Sampler(SamplingConfig()).sample(logits, [1]) == 1
    assert Sampler(SamplingConfig(repetition_penalty=2.0)).sample(logits, [1]) == 2
    assert Sampler(SamplingConfig()).probabilities(logits, []).tolist() == [0, 1, 0, 0]


def test_a_tiny_temperature_is_greedy() -> None:
    for temperature in (1e-30, 5e-324):
        sampler = Sampler(SamplingConfig(temperature=temperature, top_p=0.9, min_p=0.1, seed=0))
        assert sampler.sample(logits_of(0), []) == int(np.argmax(logits_of(0)))


def test_a_seed_repeats_the_tokens() -> None:
    config = SamplingConfig(temperature=1.5, seed=11)

    def draw(c: SamplingConfig) -> list[int]:
        sampler = Sampler(c)
        return [sampler.sample(logits_of(i), []) for i in range(30)]

    assert draw(config) == draw(config)
    assert draw(config) != draw(replace(config, seed=12))
    assert draw(replace(config, seed=None)) != draw(replace(config, seed=None))


def test_draws_follow_the_probabilities() -> None:
    config = SamplingConfig(temperature=1.0, top_k=5, seed=0)
    sampler, logits = Sampler(config), logits_of(1)
    counts = np.bincount([sampler.sample(logits, []) for _ in range(4000)], minlength=VOCAB)
    np.testing.assert_allclose(counts / 4000, sampler.probabilities(logits, []), atol=0.03)


def test_nan_is_never_sampled() -> None:
    logits = np.array([0, np.nan], dtype=np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(FlashInferError, match="NaN"):
            Sampler(SamplingConfig(temperature=temperature)).sample(logits, [])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1, 1.5]),
        ("top_p", [0.0, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0.0, -1.0, float("inf")]),
        ("seed", [-1, 0.5]),
    ],
)
def test_values_out_of_range(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            check_sampling(replace(SamplingConfig(), **{name: value}))
