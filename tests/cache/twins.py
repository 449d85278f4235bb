"""Two policies of the same sizes, asked for the same: they must decide the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.cache import Change, Policy
from flashinfer.cache.slotmap import Index

RECORDS = 40


def any_sequence(examples: int) -> Callable[[Any], Any]:
    """Sizes of two tiers and how they are asked, for `assert_decide_the_same`."""
    cases = given(
        near=st.integers(0, RECORDS // 2), far=st.integers(0, RECORDS), window=st.integers(0, 4),
        retention=st.sampled_from(["frequency", "window"]), share=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
        seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    return lambda test: settings(max_examples=examples, deadline=None)(cases(test))


def same(one: Change, other: Change) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(astuple(one), astuple(other), strict=True))


def subset(rng: np.random.Generator, share: float) -> Index:
    """Low numbers are used more often, so that scores differ."""
    return np.flatnonzero(rng.random(RECORDS) < 2 * share * np.linspace(1, 0, RECORDS))


def assert_decide_the_same(twin: Policy, native: Policy, *, share: float, seed: int) -> None:
    """Steps of one token and of some, and preloads, in a random order. share: of the records that a token needs."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        kind = rng.random()
        if kind < 0.1:
            free = np.flatnonzero(twin.slot_of < 0)[: max(0, min(twin.slots, RECORDS) - twin.used)]
            assert np.array_equal(twin.preload(free[::2]), native.preload(free[::2]))
        else:
            recent = [subset(rng, share) for _ in range(int(rng.integers(1, 6)) if kind < 0.3 else 0)]
            needed = np.unique(np.concatenate([subset(rng, share), *recent]))
            assert same(twin.step(needed, recent), native.step(needed, recent))
        assert np.array_equal(twin.slot_of, native.slot_of)
        assert twin.used == native.used
        assert twin.effective_window == native.effective_window
        assert [a.tolist() for a in twin.window] == [a.tolist() for a in native.window]
