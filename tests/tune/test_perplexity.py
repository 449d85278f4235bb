"""Perplexity is that of the same protocol in transformers; windows score each token once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashinfer
from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.generate import load
from flashinfer.text import load_tokenizer
from flashinfer.tune.perplexity import Protocol, Score, Window, bos_of, normalise, perplexity, windows
from tests.checkpoints import make_llama, make_opt
from tests.tiny_tokenizers import tiny_gpt2, tiny_json, tiny_sentencepiece

DEMO = Path(flashinfer.__file__).parent / "_demo"
TOKENS = np.random.default_rng(11).integers(3, 96, 200)
PROTOCOLS = [Protocol(48, 47, 1), Protocol(64, 20, 1), Protocol(32, 32, None), Protocol(48, 16, None)]


def transformers_nll(checkpoint: Path, ids: list[int], p: Protocol) -> tuple[float, int]:
    """The strided loop of Hugging Face's guide, its labels shifted by hand; BOS before each window."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    bos = [] if p.bos is None else [p.bos]
    nll, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), p.stride):
        end = min(begin + p.context - len(bos), len(ids))
        inputs = torch.tensor([bos + ids[begin:end]])
        labels = inputs.clone()
        labels[:, : inputs.shape[1] - (end - before)] = -100
        with torch.no_grad():
            logits = model(inputs).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
        before = end
        if end == len(ids):
            break
    return nll, count


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its store, of both families."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for family, make in (("llama", make_llama), ("opt", make_opt)):
        made[family] = make(root / family), root / f"{family}.flash"
        flashinfer.pack(*made[family])
    return made


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_each_token_is_scored_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    cut = windows(tokens, context, stride)
    assert [n for w in cut for n in range(w.scored, w.end)] == list(range(tokens))
    assert all(w.begin == n * stride and w.begin <= w.scored < w.end <= w.begin + context for n, w in enumerate(cut))
    assert all(w.end == w.begin + context for w in cut[:-1])
    assert cut[-1].end == tokens
    assert all(w.scored - w.begin >= context - stride for w in cut[1:])


def test_what_has_nothing_before_it_is_not_scored() -> None:
    assert windows(10, 4, 3) == [Window(0, 4, 0), Window(3, 7, 4), Window(6, 10, 7)]
    assert Protocol(4, 3, None).windows(10) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]
    assert Protocol(4, 4, None).windows(9) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert Protocol(5, 4, 1).windows(9) == [Window(0, 4, 0), Window(4, 8, 4), Window(8, 9, 8)]
    assert [p.scored(9) for p in (Protocol(4, 4, None), Protocol(5, 4, 1))] == [6, 9]
    assert [p.run(9) for p in (Protocol(4, 4, None), Protocol(5, 4, 1))] == [6, 9]


@pytest.mark.parametrize(("context", "stride", "bos"), [(1, 1, None), (8, 0, None), (8, 9, None), (8, 8, 1)])
def test_protocols_that_leave_tokens_out(context: int, stride: int, bos: int | None) -> None:
    with pytest.raises(ValueError, match=r"context|stride"):
        Protocol(context, stride, bos)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.context}-{p.stride}-{p.bos}")
def test_it_is_that_of_transformers(packed, family: str, protocol: Protocol) -> None:
    checkpoint, store = packed[family]
    nll, count = transformers_nll(checkpoint, TOKENS.tolist(), protocol)
    with Model.open(store, context=protocol.context) as model:
        score = perplexity(model, TOKENS, protocol)
    assert score.tokens == count == protocol.scored(len(TOKENS))
    assert score.perplexity == pytest.approx(math.exp(nll / count), abs=1e-3)


def test_it_is_that_of_transformers_on_the_embedded_model(tmp_path: Path) -> None:
    flashinfer.pack(DEMO, tmp_path / "store")
    with load(tmp_path / "store") as model:
        said = [model.generate(start, max_new_tokens=150, temperature=0.8, seed=3).text for start in ("One day", "The")]
        ids = np.array(model.tokenizer.encode("One day" + said[0] + "\nThe" + said[1], add_bos=False))
        protocol = Protocol(128, 64, bos_of(model.tokenizer))
    nll, count = transformers_nll(DEMO, ids.tolist(), protocol)
    with Model.open(tmp_path / "store", context=128) as engine:
        score = perplexity(engine, ids, protocol)
    assert score.tokens == count == len(ids) > 200
    assert 1.0 < score.perplexity < 30.0
    assert score.perplexity == pytest.approx(math.exp(nll / count), abs=1e-3)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_chunks_do_not_matter(packed, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("flashinfer.native._kernels")
    scores = set()
    for chunk in (16, 32, 128):
        run = RunConfig(backend=backend, prefill_chunk=chunk)
        with Model.open(packed["llama"][1], run=run, context=64) as model:
            scores.add(perplexity(model, TOKENS, Protocol(64, 40, 1), chunk=chunk).nll)
    assert max(scores) == pytest.approx(min(scores), rel=1e-12 if backend == "native" else 1e-6)


def test_who_looks_on_sees_every_scored_token_once_and_in_order(packed) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    done: list[tuple[int, int]] = []
    protocol = Protocol(60, 30, 1)
    with Model.open(packed["opt"][1], context=60) as model:
        score = perplexity(
            model, TOKENS, protocol, chunk=16, on_chunk=lambda logs, ids: seen.append((logs, ids)),
            progress=lambda *now: done.append(now),
        )  # fmt: skip
        first = model.logits(model.session(), [1, *TOKENS[:58].tolist()])
    assert np.concatenate([ids for _, ids in seen]).tolist() == TOKENS.tolist()
    assert max(len(logs) for logs, _ in seen) <= 16
    rows = np.concatenate([logs for logs, _ in seen])
    assert rows.shape == (len(TOKENS), 96)
    assert np.allclose(rows[:59], torch.log_softmax(torch.from_numpy(first), dim=1), atol=1e-5)
    assert score.nll == pytest.approx(-rows[np.arange(len(TOKENS)), TOKENS].sum(dtype=np.float64), rel=1e-9)
    assert done[-1] == (200, 200)
    assert done == sorted(done)


def test_log_probabilities_of_far_apart_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 1, (19, 50)).astype(np.float32)
    logits[3] *= 1e4
    logits[4] += 1e6
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    normalise(logits)
    assert np.allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_nothing_to_score(packed) -> None:
    with Model.open(packed["llama"][1], context=8) as model, pytest.raises(ValueError, match="no token"):
        perplexity(model, TOKENS[:1], Protocol(8, 8, None))


def test_scores_beyond_all_numbers() -> None:
    assert Score(10.0, 5).perplexity == pytest.approx(math.exp(2))
    assert Score(1e9, 5).perplexity == pytest.approx(math.exp(709))
    assert Score(math.inf, 5).perplexity == math.inf


def test_bos_is_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    for name, tiny, bos in (
        ("spm", tiny_sentencepiece, 1),
        ("json", tiny_json, 0),
        ("bare", lambda folder: tiny_json(folder, bos=False), None),
        ("gpt2", tiny_gpt2, 2),
        ("no-bos", lambda folder: tiny_gpt2(folder, add_bos_token=False), None),
    ):
        folder = tmp_path / name
        folder.mkdir()
        assert bos_of(load_tokenizer(tiny(folder))) == bos, name
