"""Conversations that are saved and resumed go on as if they had never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flashinfer
from flashinfer.config import Cap
from flashinfer.engine import Model
from flashinfer.errors import SessionError
from flashinfer.generate import load

CHECKPOINT = Path(flashinfer.__file__).parent / "_demo"
PROMPT = "Once upon a time, there was a dog. One day, he"
SAMPLED = {"temperature": 0.9, "top_p": 0.9}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sessions") / "demo.flash"
    flashinfer.pack(CHECKPOINT, path)
    return path


def test_the_continuation_is_the_same_bits(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=256) as model:
        whole = model.generate(PROMPT, max_new_tokens=48, seed=5, **SAMPLED)
    with load(store, context=256) as model:
        first = model.generate(PROMPT, max_new_tokens=17, seed=5, session=file, **SAMPLED)
    with load(store, context=256, weight_memory="5MiB", window=2) as model:
        second = model.generate("", max_new_tokens=31, session=file, **SAMPLED)
    assert first.tokens + second.tokens == whole.tokens
    assert first.text + second.text == whole.text


def test_a_prompt_is_added_to_the_conversation(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=256) as model:
        first = model.generate(PROMPT, max_new_tokens=8, temperature=0, session=file)
        second = model.generate(" The end. Then", max_new_tokens=8, temperature=0, session=file)
        more = tuple(model.tokenizer.encode(" The end. Then", add_bos=False))
        assert second.prompt_tokens == first.prompt_tokens + first.tokens + more
        again = model.generate(second.prompt_tokens, max_new_tokens=8, temperature=0)
    assert again.tokens == second.tokens


def test_an_abandoned_stream_is_kept_too(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=256) as model:
        stream = model.stream(PROMPT, max_new_tokens=40, temperature=0, session=file)
        begun = "".join(next(stream) for _ in range(5))
        stream.close()
        rest = model.generate("", max_new_tokens=20, temperature=0, session=file).text
        whole = model.generate(PROMPT, max_new_tokens=40, temperature=0).text
    assert whole.startswith(begun + rest)


def test_what_is_not_its_session_is_refused(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.session"
    with load(store, context=256) as model:
        model.generate(PROMPT, max_new_tokens=4, temperature=0, session=file)
        good = file.read_bytes()
        damages = {
            "cut header": (good[:40], "truncated or altered"),
            "cut payload": (good[:-10], "truncated or altered"),
            "flipped header": (good[:60] + bytes([good[60] ^ 1]) + good[61:], "truncated or altered"),
            "flipped payload": (good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], "truncated or altered"),
            "another file": (b"hello", "not a session file"),
        }
        for name, (data, message) in damages.items():
            file.write_bytes(data)
            with pytest.raises(SessionError, match=message):
                model.generate("", max_new_tokens=2, temperature=0, session=file)
            assert file.read_bytes() == data, name
        file.write_bytes(good)
        model.generate("", max_new_tokens=2, temperature=0, session=file)


def test_a_session_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "chat.session", tmp_path / "other.flash"
    flashinfer.pack(CHECKPOINT, other, quant="f32")
    with load(store, context=256) as model:
        model.generate(PROMPT, max_new_tokens=4, temperature=0, session=file)
    with load(other, context=256) as model, pytest.raises(SessionError, match="another weight store"):
        model.generate("", max_new_tokens=2, temperature=0, session=file)


def test_a_session_that_cannot_be_written_is_one_error(store: Path, tmp_path: Path) -> None:
    with load(store, context=256) as model, pytest.raises(SessionError, match="cannot be written"):
        model.generate(PROMPT, max_new_tokens=2, temperature=0, session=tmp_path / "no such folder" / "chat")


def test_the_window_comes_back(store: Path) -> None:
    cap = Cap(weight_memory=11_000_000)
    with Model.open(store, cap, context=128) as model:
        session = model.session()
        for token in range(5, 25):
            model.step(session, [token])
        window, layers = model.window(), list(model.save(session))
        assert all(len(sets) == 5 for sets in window)
        whole = model.effective_window
        used = model.ledger.decode.hits
        expected = model.step(session, [25])
        used = model.ledger.decode.hits - used
    with Model.open(store, cap, context=128) as model:
        session = model.restore(layers, 128, window)
        assert model.window() == window
        assert model.effective_window >= whole > 0
        assert np.array_equal(model.step(session, [25]), expected)
        assert model.ledger.decode.hits >= used / 2
    with Model.open(store, cap, context=128) as model:  # of another store, or altered: what there is not is left out
        session = model.restore(layers, 128, [[[-1, 10**9]], [[]], []])
        assert np.array_equal(model.step(session, [25]), expected)
