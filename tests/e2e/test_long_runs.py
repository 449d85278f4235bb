"""Texts longer than the context: the flag that goes on, and a soak that watches the process from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil

from flashinfer.units import MIB
from tests.e2e.program import DEMO, PROMPT, assert_failed, flashinfer_with, started

TOKENS = 2000
WARM = 50
"""Tokens after which memory must not grow any more; the context has been shifted by then."""
ALLOWED = 2 * MIB


def test_a_full_context_is_shifted_when_asked(demo: Path, tmp_path: Path) -> None:
    options = ("-p", PROMPT, "-n", "60", "--temperature", "0", "--context", "24", "--weight-memory", "8MiB")
    ended = flashinfer_with("generate", demo, *options)
    assert (ended.returncode, "(context)" in ended.stderr, "shifted" in ended.stderr) == (0, True, False)
    done = flashinfer_with("generate", demo, *options, "--context-shift", "--session", tmp_path / "chat", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["finish_reason"], len(result["tokens"])) == (0, "length", 60), done.stderr
    assert result["context_shifts"] > 1
    assert f"60 tokens (length), context shifted {result['context_shifts']} times, first after" in done.stderr
    assert result["text"].startswith(ended.stdout.rstrip("\n"))
    more = (*options, "--session", tmp_path / "chat")
    before = (tmp_path / "chat").read_bytes()
    assert_failed(flashinfer_with("generate", demo, *more, "-p", "and " * 24, "--context-shift"), "context of 24")
    assert (tmp_path / "chat").read_bytes() == before
    assert flashinfer_with("generate", demo, *more, "--context-shift").returncode == 0


def endless(folder: Path) -> Path:
    """The store of the embedded model, for which no token ends a text."""
    shutil.copytree(DEMO, folder / "checkpoint")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / "checkpoint" / name).read_text())
        (folder / "checkpoint" / name).write_text(json.dumps(config | {"eos_token_id": 0}))
    done = flashinfer_with("pack", folder / "checkpoint", folder / "store")
    assert done.returncode == 0, done.stderr
    return folder / "store"


def test_memory_is_flat_over_two_thousand_tokens(tmp_path: Path) -> None:
    options = ("-n", str(TOKENS), "--temperature", "0", "--context", "40", "--context-shift")
    process = started("generate", endless(tmp_path), "-p", PROMPT, *options, "--weight-memory", "8MiB")
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        watched, pieces, sizes = psutil.Process(process.pid), 0, []
        while piece := process.stdout.read(64):
            pieces += piece.count(b" ")  # a token is a word or less
            sizes += [watched.memory_info().rss] if pieces > WARM else []
        summary = process.stderr.read().decode()
        assert process.wait() == 0, summary
    finally:
        process.kill()
    assert summary.startswith(f"{TOKENS} tokens (length), context shifted ")
    assert len(sizes) > TOKENS / 10
    assert max(sizes) - sizes[0] <= ALLOWED, [size - sizes[0] for size in sizes[::50]]
