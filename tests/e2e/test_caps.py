"""The promise of `--memory`, kept where it counts: in a memory cgroup of exactly that size, without swap.

Where no cgroup can be made, what the process was ever resident stands for it (see `tests/cgroup.py`)."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from flashinfer.bench import cgroup
from flashinfer.bench.cgroup import Pressure
from flashinfer.units import MIB
from tests.adapters import for_demo
from tests.cgroup import Limited, drop_page_cache, run_limited
from tests.e2e.program import ENVIRONMENT, PROMPT, assert_failed, command, flashinfer_with

PACK_LIMIT = 120_000_000
LONG = "the quick brown fox jumps over the lazy dog " * 4
"""More than one prefill chunk: the moment that needs most memory beside weights."""
LONGEST = "the quick brown fox jumps over the lazy dog " * 41
"""Fifteen chunks, and nearly the whole context of the model: what an allocator keeps of each would add up."""
NEAR = MIB
"""The floor is named from the process's own size, which differs by some pages from one run to the next."""
CALM = Pressure(limit_hits=0, major_faults=0, refaults=0)
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


def kept(cap: int, *arguments: str | Path) -> Limited:
    """Run the program in a cgroup of that size: it ends well, and all of it fits."""
    limited = run_limited(command(*arguments), cap, env=ENVIRONMENT)
    assert (limited.returncode, limited.oom_kills) == (0, 0), limited.stderr
    assert 0 < limited.peak < cap
    return limited


def assert_kept(store: Path, options: tuple[str, ...], text: str, floor: int, beyond: int) -> dict[str, Any]:
    """Generate under a cap in a cgroup of the same size, from a cold page cache: all of it fits, decoding suffers
    nothing, the text is the same, and the bytes counted are those the kernel fetched. Returns what `--json` says."""
    cap = floor + beyond
    arguments = ("generate", store, *options, "--memory", str(cap))
    drop_page_cache(store)
    spoken = kept(cap, *arguments)
    assert spoken.stdout == text + "\n"
    assert spoken.pieces > 2
    assert spoken.writing in (CALM, None)
    drop_page_cache(store)
    result: dict[str, Any] = json.loads(kept(cap, *arguments, "--json").stdout)
    assert result["plan"]["cap"] == cap
    assert result["peak_memory"] <= cap
    assert result["text"] == text
    decode = result["ledger"]["decode"]
    if decode["device_bytes"]:
        assert decode["device_bytes"] == pytest.approx(decode["bytes_read"], rel=0.05)
    return result


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


@pytest.fixture
def in_memory(demo: Path) -> Iterator[Path]:
    """The store of the embedded model, on a filesystem that is memory."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(demo, Path(folder) / "demo.flash"))


@pytest.mark.parametrize("beyond", [NEAR, 12 * MIB])
def test_the_embedded_model(embedded: Case, beyond: int) -> None:
    assert_kept(*embedded, beyond)


@pytest.mark.parametrize("beyond", [NEAR, 64 * MIB])
def test_a_long_prompt_on_a_larger_model(long_prompt: Case, beyond: int) -> None:
    assert assert_kept(*long_prompt, beyond)["ledger"]["decode"]["bytes_read"] > 0


def test_a_prompt_that_fills_the_context(large_store: tuple[Path, Limited]) -> None:
    store = large_store[0]
    options = ("-p", LONGEST, "-n", "2", "--temperature", "0", "--threads", "2")
    cap = floor_of(store, *options) + NEAR
    result = json.loads(kept(cap, "generate", store, *options, "--memory", str(cap), "--json").stdout)
    assert len(result["prompt_tokens"]) > 1800
    assert result["peak_memory"] <= cap


def test_an_adapter_is_within_the_cap(demo: Path, tmp_path: Path) -> None:
    """Of a rank that makes it a tenth of the model, on a prompt of more than a chunk."""
    adapter = for_demo(tmp_path / "adapter", rank=64)
    with flashinfer.load(demo, context=256, adapter=adapter) as model:
        text = model.generate(LONG, max_new_tokens=16, temperature=0.0).text
    options = ("-p", LONG, "-n", "16", "--temperature", "0", "--adapter", str(adapter))
    plan = assert_kept(demo, options, text, floor_of(demo, *options), NEAR)["plan"]
    assert plan["weight_adapter"] > 7_000_000


def test_loading_makes_no_second_copy(large_store: tuple[Path, Limited]) -> None:
    """With a cap that just holds every weight, there is no room for another copy of the largest matrix."""
    store = large_store[0]
    options = ("-p", PROMPT, "-n", "2", "--temperature", "0")
    plan = json.loads(flashinfer_with("generate", store, *options, "--memory", "1GiB", "--json").stdout)["plan"]
    cap = plan["total"] + NEAR
    result = json.loads(kept(cap, "generate", store, *options, "--memory", str(cap), "--json").stdout)
    assert result["ledger"]["decode"]["bytes_read"] == 0
    assert result["ledger"]["load"]["bytes_read"] > 100 * MIB


@pytest.mark.parametrize("beyond", [NEAR, 64 * MIB])
def test_plan(embedded: Case, beyond: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whose cap is that of the run it plans: it measures the disk and the machine within it."""
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path))
    store, _, _, floor = embedded
    cap = floor + beyond
    limited = kept(cap, "plan", store, "--memory", str(cap), "--context", "21", "--seconds", "0.01", "--json")
    assert json.loads(limited.stdout)["plan"]["cap"] == cap


def test_a_cgroup_below_the_floor_is_an_error(embedded: Case) -> None:
    store, options, _, floor = embedded
    limit = floor - 8 * MIB
    done = run_limited(command("generate", store, *options), limit, env=ENVIRONMENT)
    if done.writing is None:
        pytest.skip("no memory cgroup can be made")
    assert done.oom_kills == 0
    assert_failed(done, "this model needs at least", "memory", "raise the limit")


def test_without_cgroups_the_process_is_watched(embedded: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_parents", list)
    assert_kept(*embedded, NEAR)


def test_a_store_in_memory(in_memory: Path, embedded: Case) -> None:
    """It works, and is said to take memory beside the cap."""
    _, options, text, floor = embedded
    done = flashinfer_with("generate", in_memory, *options, "--memory", str(floor + 12 * MIB))
    assert (done.returncode, done.stdout) == (0, text + "\n")
    assert "the store itself takes memory" in done.stderr
    plan = json.loads(flashinfer_with("plan", in_memory, "--memory", "500MB", "--seconds", "0.01", "--json").stdout)
    assert plan["place"]["kind"] == "memory"
    assert "the store itself takes memory" in flashinfer_with("doctor", in_memory).stdout


def test_pack(large_store: tuple[Path, Limited]) -> None:
    store, limited = large_store
    assert (limited.returncode, limited.oom_kills, limited.stderr) == (0, 0, "")
    assert 0 < limited.peak < PACK_LIMIT
    assert flashinfer_with("verify", store).returncode == 0
