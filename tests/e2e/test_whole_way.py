"""The way everything is meant to go: pack, inspect, verify, generate, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from tests.e2e.program import PROMPT, flashinfer_with
from tests.plain_checkpoint import LLAMA, OPT, fill, llama_shapes, opt_shapes, save, write_checkpoint
from tests.tiny_tokenizers import tiny_gpt2, tiny_sentencepiece

GREEDY = ("-n", "16", "--temperature", "0")


def test_inspect_and_verify(demo: Path) -> None:
    done = flashinfer_with("inspect", demo, "--json")
    summary = json.loads(done.stdout)
    assert (done.returncode, done.stderr, summary["schema_version"]) == (0, "", 1)
    assert summary["facts"]["family"] == "llama"
    done = flashinfer_with("verify", demo)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{demo}: sound")


@pytest.mark.parametrize(("cap", "objective"), [("1500kB", "time"), ("1500kB", "bytes"), ("6MiB", "bytes")])
def test_the_text_is_the_same_at_every_cap(demo: Path, uncapped: str, cap: str, objective: str) -> None:
    options = (*GREEDY, "--weight-memory", cap, "--io-objective", objective)
    source = {"input": PROMPT + "\n"} if objective == "time" else {}  # stdin is as good as -p
    done = flashinfer_with("generate", demo, *(() if source else ("-p", PROMPT)), *options, **source)
    assert (done.returncode, done.stdout) == (0, uncapped)
    assert done.stderr.count("\n") == 1
    assert "16 tokens (length)" in done.stderr


def test_one_json_object_for_a_prompt_from_a_file(demo: Path, uncapped: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    done = flashinfer_with("generate", demo, "-f", tmp_path / "prompt", *GREEDY, "--weight-memory", "8MiB", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["schema_version"]) == (0, 1)
    assert result["text"] + "\n" == uncapped
    assert len(result["tokens"]) == 16
    assert result["timings"]["decode_tokens_per_second"] > 0
    assert result["ledger"]["decode"]["tokens"] == 15
    assert result["plan"]["weight_total"] <= result["plan"]["cap"] == 8 * 2**20


def test_the_demo(demo: Path) -> None:
    done = flashinfer_with("demo", "-n", "8")
    assert done.returncode == 0, done.stderr
    assert PROMPT in done.stdout
    for word in ("mode", "cached", "always-miss", "naive", "the kernel counted", "% of the bytes"):
        assert word in done.stdout
    assert "\u2026" not in done.stdout  # the table fits 80 columns
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("config", "dtype"), [(LLAMA, "f32"), (OPT, "bf16")], ids=["llama", "opt"])
def test_sharded_checkpoints_of_both_families(config: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    checkpoint, store = tmp_path / "checkpoint", tmp_path / "store"
    config = config | {"vocab_size": 400}
    tensors = fill((llama_shapes if config["architectures"] == ["LlamaForCausalLM"] else opt_shapes)(config))
    write_checkpoint(checkpoint, config, tensors)
    (checkpoint / "model.safetensors").unlink()
    shards = {name: f"{k % 3}.safetensors" for k, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save(checkpoint / shard, {name: v for name, v in tensors.items() if shards[name] == shard}, dtype)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tiny_sentencepiece if dtype == "f32" else tiny_gpt2)(checkpoint)
    assert flashinfer_with("pack", checkpoint, store).returncode == 0
    assert flashinfer_with("verify", store).returncode == 0
    with flashinfer.load(store) as model:
        tokens = model.generate("The dog", max_new_tokens=8, temperature=0.0).tokens
    options = ("-n", "8", "--temperature", "0", "--weight-memory", "400kB", "--json")
    result = json.loads(flashinfer_with("generate", store, "-p", "The dog", *options).stdout)
    assert result["tokens"] == list(tokens)
