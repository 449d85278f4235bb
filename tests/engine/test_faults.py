"""What fails in the middle of a step leaves the model right: an error, then the same bits as ever."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from flashinfer import engine
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import DeviceError, PromptError, StoreReadError
from flashinfer.io import MemoryReader

TOKENS = [5, 9, 33, 71, 8, 15, 60, 42]
RUN = RunConfig(staging=64 * 1024)


@pytest.fixture
def small(packed, monkeypatch):
    """Open the llama store through a memory reader at its floor; returns (open, reader list)."""
    readers: list[MemoryReader] = []

    def open_memory(paths, config):
        readers.append(MemoryReader([p.read_bytes() for p in paths]))
        return readers[-1]

    monkeypatch.setattr(engine, "open_reader", open_memory)

    def open_model(cap: int | None = 440_000) -> Model:
        return Model.open(packed("llama").store, Cap(weight_memory=cap), context=64, run=RUN)

    return open_model, readers


@pytest.mark.parametrize("file", [0, 1])
def test_a_read_error_is_reported_and_forgotten(small, file: int) -> None:
    open_model, readers = small
    with open_model() as model:
        expected = [model.step(s := model.session(), TOKENS), *(model.step(s, [t]) for t in TOKENS)]
    with open_model() as model:
        session = model.session()
        reader = readers[-1]
        got, failures = [model.step(session, TOKENS)], 0
        size = len(reader.blobs[file])
        for token in TOKENS:
            reader.fail_at = {(file, b) for b in range(0, size, 512)}
            before = session.length
            with contextlib.suppress(StoreReadError):  # a token all of whose neurons are in slots does not fail
                model.step(session, [token])
                failures -= 1
            failures += 1
            reader.fail_at = set()
            session.truncate(before)
            got.append(model.step(session, [token]))
        assert failures > 0
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a, b)


def test_an_interrupt_leaves_the_model_usable(small, monkeypatch) -> None:
    open_model, _ = small
    with open_model() as model:
        expected = model.step(model.session(), TOKENS)
    with open_model() as model:
        session, backend = model.session(), model._weights.backend
        calls, ffn = [0], backend.ffn

        def interrupted(*args: object) -> None:
            calls[0] += 1
            if calls[0] == 2:
                raise KeyboardInterrupt
            ffn(*args)

        monkeypatch.setattr(backend, "ffn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.step(session, TOKENS)
        assert session.length == 0
        assert np.array_equal(model.step(session, TOKENS), expected)


def test_truncate_and_repeat(small) -> None:
    open_model, _ = small
    with open_model() as model:
        session = model.session()
        model.step(session, TOKENS)
        first = model.step(session, [7])
        session.truncate(len(TOKENS))
        assert np.array_equal(model.step(session, [7]), first)


def test_two_sessions_share_the_cache(small) -> None:
    open_model, _ = small
    with open_model() as model:
        alone = model.session()
        expected = [model.step(alone, [t]) for t in TOKENS]
        a, b = model.session(), model.session()
        for token, logits in zip(TOKENS, expected, strict=True):
            assert np.array_equal(model.step(a, [token]), logits)
            model.step(b, [token + 1])


@pytest.mark.parametrize("tokens", [[], [96], [-1]])
def test_bad_tokens(small, tokens) -> None:
    open_model, _ = small
    with open_model() as model, pytest.raises(PromptError):
        model.step(model.session(), tokens)


def test_the_context_is_a_limit(small, packed) -> None:
    open_model, _ = small
    with open_model() as model, pytest.raises(PromptError, match=r"65 tokens do not fit the context of 64"):
        model.step(model.session(), [5] * 65)
    with pytest.raises(PromptError, match=r"not in 1..256"):
        Model.open(packed("llama").store, context=257)


def test_a_device_that_is_not_there(packed) -> None:
    with pytest.raises(DeviceError, match="--device cpu"):
        Model.open(packed("llama").store, device="cuda:77")


def test_close_is_idempotent(small) -> None:
    open_model, _ = small
    model = open_model()
    model.close()
    model.close()
