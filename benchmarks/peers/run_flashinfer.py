"""Contender: our engine under `--memory CAP`, and what it predicts on the disk as it was while the tokens were made."""

from __future__ import annotations

import contextlib
from typing import Any

import flashinfer
from flashinfer import machine
from flashinfer.config import Cap, DiskCurve, Rates
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError

from . import report


def _predicted(model: Model, job: dict[str, Any], curves: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Bytes and seconds per token by the plan, on each of the disk curves."""
    rates, prompt = Rates(**job["rates"]), len(job["prompt"])
    made = {name: model.predict(DiskCurve(**curve), rates, prompt_tokens=prompt) for name, curve in curves.items()}
    return {name: {"bytes": p.flash_bytes, "seconds": p.token_seconds, "bound": p.bound} for name, p in made.items()}


def _run(job: dict[str, Any], open_models: contextlib.ExitStack) -> Model:
    """Load, prompt, tokens; the parent looks at the disk before the first, before the middle one and at the end."""
    opened: list[Model] = []

    def load() -> report.Step:
        cap = Cap(memory=machine.memory_cap(job["cap"]))
        model = open_models.enter_context(Model.open(job["model"], cap, context=job["context"]))
        opened.append(model)
        session = model.session()
        return lambda tokens: model.step(session, tokens)

    def between(n: int) -> None:
        if n in (0, len(job["script"]) // 2):
            report.ask("probe")

    report.run(load, job, between)
    return opened[0]


def main() -> None:
    job = report.job()
    with contextlib.ExitStack() as open_models:
        try:
            model = _run(job, open_models)
        except CapTooSmallError as e:
            report.tell("refused", floor=e.floor)
            return
        answer = report.ask("probe")
        report.tell(
            "end",
            version=flashinfer.__version__,
            ledger=model.ledger.to_json(),
            weights=model.plan.weight_total,
            reader=model.reader_note,
            peak_resident=machine.peak_resident_bytes(),
            predicted=_predicted(model, job, answer["curves"]),
        )


if __name__ == "__main__":
    main()
