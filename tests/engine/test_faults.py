"""What fails in the middle of a step leaves the model right: an error, then the same bits as ever."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest

from flashinfer import engine
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import DeviceError, FlashInferError, PromptError, StoreError, StoreReadError
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


def test_a_closed_model_says_so(small) -> None:
    open_model, _ = small
    model = open_model()
    session = model.session()
    model.close()
    with pytest.raises(FlashInferError, match="the model is closed"):
        model.step(session, [5])
    with pytest.raises(FlashInferError, match="the model is closed"):
        model.session()


def test_a_closed_session_says_so(small) -> None:
    open_model, _ = small
    with open_model() as model:
        session = model.session()
        session.close()
        with pytest.raises(FlashInferError, match="the session is closed"):
            model.step(session, [5])


def test_a_session_of_another_model_is_refused(small) -> None:
    """Its keys and values would fit, and mean nothing."""
    open_model, _ = small
    with open_model() as model, open_model() as other:
        session = other.session()
        other.step(session, TOKENS)
        with pytest.raises(FlashInferError, match="another model"):
            model.step(session, [5])
        assert session.length == len(TOKENS)


def test_a_session_cannot_be_truncated_to_what_it_never_held(small) -> None:
    open_model, _ = small
    with open_model() as model:
        session = model.session()
        model.step(session, TOKENS)
        for length in (-1, len(TOKENS) + 1):
            with pytest.raises(ValueError, match=f"{length} tokens"):
                session.truncate(length)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_session_for_no_tokens_is_refused(small, capacity: int) -> None:
    open_model, _ = small
    with open_model() as model, pytest.raises(PromptError, match="at least 1"):
        model.session(capacity)


def test_a_failed_open_leaves_nothing_open(packed, monkeypatch) -> None:
    """Whatever fails, down to the last thing that is made."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("this system does not list a process's files")

    def fails(*args: object, **kwargs: object) -> None:
        raise StoreError("for the test")

    store = packed("llama").store
    Model.open(store).close()
    before = len(list(folder.iterdir())), threading.active_count()
    for name in ("settle", "StreamedWeights", "Decoder"):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, fails)
            with pytest.raises(StoreError, match="for the test"):
                Model.open(store)
        assert (len(list(folder.iterdir())), threading.active_count()) == before


def test_the_ledger_waits_for_reads_and_not_twice(small, monkeypatch) -> None:
    """All the time in `wait` is I/O wait of the phase it fell in, loading included; a failed step did no tokens."""
    open_model, readers = small
    delayed = engine.open_reader

    def open_slow(paths, config):
        reader = delayed(paths, config)
        reader.delay = 0.001
        return reader

    monkeypatch.setattr(engine, "open_reader", open_slow)
    with open_model() as model:
        stats = readers[-1].stats
        assert 0 < stats.seconds_waiting <= model.ledger.load.io_wait <= model.ledger.load.seconds
        session = model.session()
        model.step(session, TOKENS)
        for token in TOKENS:
            model.step(session, [token])
        accounts = [model.ledger.load, model.ledger.prefill, model.ledger.decode]
        assert sum(a.io_wait for a in accounts) >= stats.seconds_waiting
        assert sum(a.bytes_read for a in accounts) == stats.bytes
        assert sum(a.reads for a in accounts) == stats.reads
        assert all(0 < a.useful_bytes <= a.bytes_read for a in accounts)
        assert all(a.io_wait + a.management <= a.seconds for a in accounts)
        readers[-1].fail_at = {(0, b) for b in range(0, len(readers[-1].blobs[0]), 512)}
        with pytest.raises(StoreReadError):
            model.step(session, TOKENS)
        assert model.ledger.prefill.tokens == len(TOKENS)
        assert model.ledger.prefill.steps == 1
