"""The promise of `--memory`, kept where it counts: in a memory cgroup of exactly that size, without swap."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from flashinfer.units import MIB
from tests.cgroup import Limited, drop_page_cache, run_limited
from tests.e2e.program import ENVIRONMENT, PROMPT, command, flashinfer_with

PACK_LIMIT = 200_000_000
LONG = "the quick brown fox jumps over the lazy dog " * 4
"""More than one prefill chunk: the moment that needs most memory beside weights."""
NEAR = MIB
"""The floor is named from the process's own size, which differs by some pages from one run to the next."""
Case = tuple[Path, tuple[str, ...], str, int]
"""A store, the options of `generate`, the text they give without a cap, the floor."""


@pytest.fixture(scope="module")
def large_store(large: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Limited]:
    """The store of the large checkpoint, packed in a cgroup of about its size, and how that went."""
    store = tmp_path_factory.mktemp("packed") / "large.flash"
    drop_page_cache(large)
    return store, run_limited(command("pack", large, store), PACK_LIMIT, env=ENVIRONMENT)


def floor_of(store: Path, *options: str) -> int:
    """What the program itself names as the smallest `--memory`."""
    done = flashinfer_with("generate", store, *options, "--memory", "1MB")
    match = re.search(r"memory cap of 977 KiB is below the floor .*\((\d+) bytes\)", done.stderr)
    assert match is not None, done.stderr
    return int(match[1])


def assert_kept(store: Path, options: tuple[str, ...], text: str, floor: int, beyond: int) -> None:
    """Generate under a cap in a cgroup of the same size: all of it fits, and the text is the same."""
    cap = floor + beyond
    drop_page_cache(store)
    limited = run_limited(command("generate", store, *options, "--memory", str(cap), "--json"), cap, env=ENVIRONMENT)
    assert (limited.returncode, limited.oom_kills) == (0, 0), limited.stderr
    result: dict[str, Any] = json.loads(limited.stdout)
    assert result["plan"]["cap"] == cap
    assert 0 < limited.peak < cap
    assert result["peak_memory"] <= cap
    assert result["text"] == text


@pytest.fixture(scope="module")
def embedded(demo: Path, uncapped: str) -> Case:
    options = ("-p", PROMPT, "-n", "16", "--temperature", "0")
    return demo, options, uncapped.removesuffix("\n"), floor_of(demo, *options)


@pytest.fixture(scope="module")
def long_prompt(large_store: tuple[Path, Limited]) -> Case:
    """On two threads; sampled, so that the text of a random model shows every difference in the logits."""
    store = large_store[0]
    with flashinfer.load(store, context=256) as model:
        text = model.generate(LONG, max_new_tokens=4, temperature=1.0, seed=3).text
    assert len(set(text)) > 1
    options = ("-p", LONG, "-n", "4", "--temperature", "1", "--seed", "3", "--threads", "2")
    return store, options, text, floor_of(store, *options)


@pytest.mark.parametrize("beyond", [NEAR, 12 * MIB])
def test_the_embedded_model(embedded: Case, beyond: int) -> None:
    assert_kept(*embedded, beyond)


@pytest.mark.parametrize("beyond", [NEAR, 64 * MIB])
def test_a_long_prompt_on_a_larger_model(long_prompt: Case, beyond: int) -> None:
    assert_kept(*long_prompt, beyond)


def test_pack(large_store: tuple[Path, Limited]) -> None:
    store, limited = large_store
    assert (limited.returncode, limited.oom_kills, limited.stderr) == (0, 0, "")
    assert 0 < limited.peak < PACK_LIMIT
    assert flashinfer_with("verify", store).returncode == 0
