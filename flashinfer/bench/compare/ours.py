"""Our own runtime as a contender: one rung under a cap, what it predicts, and what it asked of the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flashinfer
from flashinfer import machine
from flashinfer.backend import open_backend
from flashinfer.bench.compare.apart import ApartReader, cuts_of
from flashinfer.bench.compare.contenders import LADDER, OTHERS, Rung
from flashinfer.bench.compare.peers import report
from flashinfer.config import Cap, DiskCurve, IoConfig, KvType, Rates, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.io import Reader, ReadStats, open_reader
from flashinfer.memory import Plan
from flashinfer.model.neurons import NEURON_FILE
from flashinfer.request import files_of, settle, threads_for
from flashinfer.store import Store, open_store


def run_of(rung: Rung, predictor: str, kv_type: KvType) -> RunConfig:
    """The rung as the runtime is told of it. What is read part by part has no holes read through."""
    io = IoConfig(reader=rung.reader, objective="bytes" if rung.apart else IoConfig.objective)
    return replace(
        RunConfig(), io=io, backend=rung.backend, predictor=predictor, lookahead=rung.lookahead,
        kv_type=kv_type,
    )  # fmt: skip


def halved(cap: Cap, weights: int, plan: Plan) -> Cap:
    """The cap, or half of the weights (bytes) where its plan would hold more of them."""
    return Cap(weight_memory=weights // 2) if plan.weight_total > weights // 2 else cap


def cap_of(rung: Rung, store: Store, job: dict[str, Any], run: RunConfig) -> Cap:
    """What the run may take."""
    cap = Cap(memory=machine.memory_cap(job["cap"]))
    if not rung.half:
        return cap
    backend = open_backend("cpu", threads_for(store.manifest, run), run.backend)
    reader = open_reader(files_of(store), run.io)
    try:
        settled = settle(store, reader, backend, cap, context=job["context"], run=run, mode=rung.mode)
    finally:
        reader.close()
        backend.close()
    return halved(cap, store.manifest.weight_bytes(), settled.plan)


@dataclass
class _Opened:
    """The model and its reader, once they are there; `before`: what had been read when the first token was due."""

    store: Store
    model: Model | None = None
    reader: Reader | None = None
    before: ReadStats = field(default_factory=ReadStats)

    def asked(self, tokens: int) -> dict[str, float]:
        """Bytes and reads per token, as they were submitted."""
        assert self.reader is not None
        now = self.reader.stats
        return {"bytes": (now.bytes - self.before.bytes) / tokens, "reads": (now.reads - self.before.reads) / tokens}


def _open(opened: _Opened, rung: Rung, job: dict[str, Any], stack: contextlib.ExitStack) -> Model:
    run = run_of(rung, job["predictor"], job["kv_type"])

    def reader_of(paths: Sequence[Path]) -> Reader:
        reader = open_reader(paths, run.io)
        opened.reader = ApartReader(reader, NEURON_FILE, cuts_of(opened.store.manifest)) if rung.apart else reader
        return opened.reader

    cap = cap_of(rung, opened.store, job, run)
    opened.model = stack.enter_context(
        Model.open(opened.store, cap, context=job["context"], run=run, mode=rung.mode, reader_of=reader_of)
    )
    return opened.model


def _run(opened: _Opened, rung: Rung, job: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Load, prompt, tokens; the parent looks at the disk before the first and before the middle one."""

    def load() -> report.Step:
        model = _open(opened, rung, job, stack)
        session = model.session()

        def step(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
            return model.step(session, tokens)

        return step

    def between(n: int) -> None:
        if n in (0, len(job["script"]) // 2):
            report.ask("probe")
        if n == 0 and opened.reader is not None:
            opened.before = replace(opened.reader.stats)

    report.run(load, job, between)


def _predicted(model: Model, job: dict[str, Any], curves: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Bytes and seconds per token by the plan, on each of the disk curves."""
    rates, prompt = Rates(**job["rates"]), len(job["prompt"])
    made = {name: model.predict(DiskCurve(**curve), rates, prompt_tokens=prompt) for name, curve in curves.items()}
    return {
        name: {"bytes": p.flash_bytes, "seconds": p.token_seconds, "dram_bytes": p.dram_bytes, "bound": p.bound}
        for name, p in made.items()
    }


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()
    rung = next(r for r in (*LADDER, *OTHERS) if r.name == job["rung"])
    opened = _Opened(open_store(Path(job["model"])))
    with contextlib.ExitStack() as stack:
        try:
            _run(opened, rung, job, stack)
        except CapTooSmallError as e:
            report.tell("refused", floor=e.floor)
            return
        model, answer = opened.model, report.ask("probe")
        assert model is not None
        report.end(
            flashinfer.__version__,
            asked=opened.asked(len(job["script"])),
            ledger=model.ledger.to_json(),
            weights=model.plan.weight_total,
            predictor=model.choice.note or model.choice.kind,
            reader=model.reader_note,
            predicted=_predicted(model, job, answer["curves"]),
        )


if __name__ == "__main__":
    main()
