"""When the context is full: the text is shortened, and goes on in every bit as a fresh session of it would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashinfer
from flashinfer.errors import PromptError
from flashinfer.generate import TextModel, load
from tests.generate.fake import LetterTokenizer, fake_model

CHECKPOINT = Path(flashinfer.__file__).parent / "_demo"
PROMPT = "Once upon a time, there was a dog. One day, he"
CONTEXT = 40
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "context_shift": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shift") / "demo.flash"
    flashinfer.pack(CHECKPOINT, path)
    return path


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Mistral whose attention looks back no further than 12 tokens."""
    path = tmp_path_factory.mktemp("windowed")
    shutil.copytree(CHECKPOINT, path / "checkpoint")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "sliding_window": 12}
    (path / "checkpoint" / "config.json").write_text(json.dumps(config))
    flashinfer.pack(path / "checkpoint", path / "demo.flash")
    return path / "demo.flash"


def plain_twin(model: TextModel, prompt: list[int], script: list[int]) -> list[np.ndarray]:
    """The logits before each token of the script, with a fresh session whenever the context is full."""
    known, session, out = list(prompt), model._engine.session(CONTEXT), []
    for token in script:
        if len(known) > CONTEXT:
            known = known[:1] + known[len(known) - CONTEXT // 2 :]
            session = model._engine.session(CONTEXT)
        out.append(model._engine.step(session, known[session.length :]))
        known.append(token)
    return out


@pytest.mark.parametrize("which", ["store", "windowed"])
def test_it_is_a_fresh_session_of_the_shortened_text(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Path = request.getfixturevalue(which)
    seen: list[np.ndarray] = []
    with load(store, context=CONTEXT, weight_memory="5MiB") as model:
        step = model._engine.step

        def noted(*arguments: Any) -> np.ndarray:
            seen.append(step(*arguments))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(model._engine, "step", noted)
            result = model.generate(PROMPT, max_new_tokens=90, seed=3, **SAMPLED)
        expected = plain_twin(model, model.tokenizer.encode(PROMPT), list(result.tokens))
    assert (len(result.tokens), result.finish_reason) == (90, "length")
    assert result.context_shifts == 4
    assert len(seen) == len(expected) == 90
    assert all(np.array_equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("first", [5, 24, 27, 28, 29, 60])
def test_a_session_goes_on_with_the_shortened_text(store: Path, tmp_path: Path, first: int) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=CONTEXT) as model:
        whole = model.generate(PROMPT, max_new_tokens=80, seed=5, **SAMPLED)
        begun = model.generate(PROMPT, max_new_tokens=first, seed=5, session=file, **SAMPLED)
    with load(store, context=CONTEXT) as model:
        rest = model.generate("", max_new_tokens=80 - first, session=file, **SAMPLED)
    assert begun.tokens + rest.tokens == whole.tokens
    assert begun.context_shifts + rest.context_shifts == whole.context_shifts


def test_a_full_session_goes_on_only_when_asked(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=CONTEXT) as model:
        assert model.generate(PROMPT, max_new_tokens=99, temperature=0, session=file).finish_reason == "context"
        with pytest.raises(PromptError, match=f"exceeds the context of {CONTEXT}"):
            model.generate("", temperature=0, session=file)
        with pytest.raises(PromptError, match=f"exceeds the context of {CONTEXT}"):
            model.generate(" and" * CONTEXT, temperature=0, session=file, context_shift=True)
        result = model.generate(" and then", max_new_tokens=30, temperature=0, session=file, context_shift=True)
        assert (result.finish_reason, len(result.tokens)) == ("length", 30)
        assert result.context_shifts >= 1
    with load(store, context=CONTEXT // 2) as model:  # what was kept under a larger context is shortened to this one
        result = model.generate("", max_new_tokens=5, temperature=0, session=file, context_shift=True)
        assert (len(result.tokens), result.context_shifts) == (5, 1)


def test_what_is_new_is_never_dropped(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=CONTEXT) as model:
        model.generate(PROMPT, max_new_tokens=99, temperature=0, session=file)
        more = model.tokenizer.encode(" one two three four five six seven eight nine ten" * 3, add_bos=False)[:33]
        seen: list[list[int]] = []
        step = model._engine.step
        model._engine.step = lambda s, t: (seen.append(list(t)), step(s, t))[1]  # type: ignore[method-assign]
        model.generate(more, max_new_tokens=1, temperature=0, session=file, context_shift=True)
    assert seen[0][-33:] == more
    assert len(seen[0]) == 35  # with the first token, and the one that was drawn last


def test_an_interrupted_shift_is_kept(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=CONTEXT) as model:
        whole = model.generate(PROMPT, max_new_tokens=60, seed=5, **SAMPLED)
        step = model._engine.step

        def struck(session: Any, tokens: list[int]) -> np.ndarray:
            if session.length == 0 and tokens[1:] != model.tokenizer.encode(PROMPT)[1:]:
                raise KeyboardInterrupt
            return step(session, tokens)

        with monkeypatch.context() as patch:
            patch.setattr(model._engine, "step", struck)
            stream = model.stream(PROMPT, max_new_tokens=60, seed=5, session=file, **SAMPLED)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        begun = stream.result.tokens
        rest = model.generate("", max_new_tokens=60 - len(begun), session=file, **SAMPLED)
    assert 0 < len(begun) < 60
    assert begun + rest.tokens == whole.tokens


def test_how_often_is_counted() -> None:
    model, engine = fake_model("hello ", context=10)
    result = model.generate("abcde", max_new_tokens=30, context_shift=True)
    # six tokens of prompt; after every five more, ten are full: the first and the newest five stay
    assert (len(result.tokens), result.finish_reason, result.context_shifts) == (30, "length", 5)
    assert engine.open_sessions == 0
    assert model.generate("abcde", max_new_tokens=5, context_shift=True).context_shifts == 0
    with pytest.raises(PromptError, match="10 tokens"):
        model.generate("abcdefghi", context_shift=True)


@pytest.mark.parametrize("context", [2, 3, 4, 5])
def test_the_smallest_contexts(context: int) -> None:
    model, _ = fake_model("hello ", context=context)
    assert len(model.generate([LetterTokenizer.bos_id], max_new_tokens=20, context_shift=True).tokens) == 20
