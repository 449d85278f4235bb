"""The trace: a whole file whatever happens, the ledger's own figures, no memory, nothing where it is not asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flashinfer.config import Cap
from flashinfer.engine import Model
from flashinfer.errors import TraceError
from flashinfer.ledger import NOTHING, Ledger
from flashinfer.trace import Trace
from tests.e2e.program import names_in

TOKENS = [5, 9, 33, 71, 8, 15, 60, 42]


def traced(path: Path, phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == phase]


def test_it_shows_what_the_ledger_counts(packed, tmp_path: Path) -> None:
    with (
        Trace(tmp_path / "t.json") as trace,
        Model.open(packed("llama").store, Cap(weight_memory=440_000), context=64, trace=trace) as model,
    ):
        session = model.session()
        model.step(session, TOKENS)
        for token in TOKENS:
            model.step(session, [token])
        accounts = [model.ledger.load, model.ledger.prefill, model.ledger.decode]
        layers = model.facts.num_layers
    spans = traced(tmp_path / "t.json", "X")

    def seconds(*names: str) -> float:
        return sum(e["dur"] for e in spans if e["name"] in names) / 1e6

    assert seconds("load", "prefill", "decode") == pytest.approx(sum(a.seconds for a in accounts), rel=1e-3)
    assert seconds("wait for reads") == pytest.approx(sum(a.io_wait for a in accounts), rel=1e-3)
    assert seconds("cache") == pytest.approx(sum(a.planning for a in accounts), rel=1e-3)
    assert seconds("copy records") == pytest.approx(sum(a.copying for a in accounts), rel=1e-3)
    assert seconds("submit reads") == pytest.approx(sum(a.submitting for a in accounts), rel=1e-3)
    assert all(0 < a.submitting <= a.management < a.seconds for a in accounts)
    for name in ("attention", "ffn"):
        found = [e["args"]["layer"] for e in spans if e["name"] == name]
        assert found == list(range(layers)) * (1 + len(TOKENS))
    for name, count in (("embedding", 9), ("head", 9), ("prefill", 1), ("decode", 8), ("load", 1)):
        assert len([e for e in spans if e["name"] == name]) == count
    begun, ended = traced(tmp_path / "t.json", "b"), traced(tmp_path / "t.json", "e")
    assert sum(e["args"]["bytes"] for e in begun) == sum(a.bytes_read for a in accounts)
    assert sum(e["args"]["reads"] for e in begun) == sum(a.reads for a in accounts)
    assert {e["id"] for e in ended} <= {e["id"] for e in begun}
    assert len(begun) == len({e["id"] for e in begun})
    counters = {e["name"]: e["args"]["bytes"] for e in traced(tmp_path / "t.json", "C")}
    assert sum(counters.values()) == sum(a.bytes_read for a in accounts)


def test_spans_lie_within_each_other(packed, tmp_path: Path) -> None:
    with Trace(tmp_path / "t.json") as trace, Model.open(packed("llama").store, context=64, trace=trace) as model:
        model.step(model.session(), TOKENS)
    inside: list[float] = []
    for event in sorted(traced(tmp_path / "t.json", "X"), key=lambda e: (e["ts"], -e["dur"])):
        while inside and inside[-1] <= event["ts"]:
            inside.pop()
        assert not inside or event["ts"] + event["dur"] <= inside[-1] + 0.01
        inside.append(event["ts"] + event["dur"])


def test_without_a_trace_a_span_is_nothing() -> None:
    assert Ledger().span("ffn", 3) is NOTHING


def test_events_do_not_pile_up(tmp_path: Path) -> None:
    with Trace(tmp_path / "t.json") as trace:
        for i in range(5000):
            trace.span("ffn", i, i + 1, {"layer": i})
            assert len(trace._events) < 512
    assert len(traced(tmp_path / "t.json", "X")) == 5000
    assert names_in(tmp_path) == ["t.json"]


@pytest.mark.parametrize("written", [0, 1000])
def test_an_interrupt_while_writing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    pwrite, strikes = os.pwrite, iter([True])

    def struck(fd: int, data: bytes, at: int) -> int:
        if next(strikes, False):
            pwrite(fd, data[:written], at)
            raise KeyboardInterrupt
        return pwrite(fd, data[:777], at)  # a short write now and then

    monkeypatch.setattr(os, "pwrite", struck)

    def run() -> None:
        with Trace(tmp_path / "t.json") as trace:
            for i in range(600):
                trace.span("ffn", i, i + 1, {})

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(traced(tmp_path / "t.json", "X")) >= 510


def test_a_disk_that_fills_up_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.json").write_text("the one before")
    trace = Trace(tmp_path / "t.json")

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    for i in range(2000):
        trace.span("ffn", i, i + 1, {})
    with pytest.raises(TraceError, match=r"t\.json cannot be written: No space left"):
        trace.close()
    trace.close()
    assert names_in(tmp_path) == ["t.json"]
    assert (tmp_path / "t.json").read_text() == "the one before"


def test_an_error_on_its_way_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match="the first"), Trace(tmp_path / "t.json"):
        raise ValueError("the first")
    assert names_in(tmp_path) == []
