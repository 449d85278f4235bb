"""The embedded model: it agrees with transformers, and half its weights in memory is enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flashinfer
from flashinfer.bench.generate import COMPARISON, Setting, continue_greedily, run_setting
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.generate import load

CHECKPOINT = Path(flashinfer.__file__).parent / "_demo"
PROMPT = "Once upon a time, there was a little girl named Lily. She"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.flash"
    flashinfer.pack(CHECKPOINT, path)
    return path


@pytest.fixture(scope="module")
def ids(store: Path) -> list[int]:
    with load(store) as model:
        return model.tokenizer.encode(PROMPT)


def test_logits_and_greedy_tokens_equal_transformers(store: Path, ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    with Model.open(store) as model, torch.no_grad():
        script = ids + continue_greedily(model, ids, 64)
        ours = model.logits(model.session(), script)
        theirs = oracle(torch.tensor([script])).logits[0].numpy()
    assert np.abs(ours - theirs).max() <= 1e-4
    assert theirs[len(ids) - 1 : -1].argmax(axis=1).tolist() == script[len(ids) :]


def test_it_fits_into_the_package() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 16 * 2**20


def test_half_its_weights_read_a_quarter_of_naive(store: Path, ids: list[int]) -> None:
    with Model.open(store) as model:
        size = model.store.manifest.weight_bytes()
        script = continue_greedily(model, ids, 64)
        direct = model.reader_note.count("O_DIRECT") > 0
    cap, run = Cap(weight_memory=size // 2), RunConfig()
    streamed = run_setting(store, Setting("cached", "bytes"), ids, script, run, cap)
    naive = run_setting(store, COMPARISON[-1], ids, script, run, cap)
    assert streamed.weights_in_memory <= size // 2
    assert streamed.bytes_read <= 0.25 * naive.bytes_read
    assert naive.bytes_read >= 0.99 * size
    if not direct or streamed.device_bytes is None:
        pytest.skip("this filesystem refuses direct reads, or the kernel does not count bytes per process")
    for sample in (streamed, naive):
        assert sample.device_bytes == pytest.approx(sample.bytes_read, rel=0.05)


def test_text_is_the_same_at_every_cap(store: Path) -> None:
    texts = set()
    for cap in ("4MiB", "5MiB", "8MiB", "64MiB"):
        with load(store, weight_memory=cap) as model:
            texts.add(model.generate(PROMPT, max_new_tokens=48, temperature=0).text)
    assert len(texts) == 1
