"""Contender: the plain loop of `naive.py`; needs torch only."""

from __future__ import annotations

from pathlib import Path

import torch

from . import report
from .naive import Naive


def main() -> None:
    job = report.job()
    torch.set_num_threads(job["threads"])

    def load() -> report.Step:
        model = Naive(Path(job["model"]), job["context"])
        return lambda tokens: model.step(tokens).numpy()

    report.run(load, job)
    report.tell("end", version=torch.__version__)


if __name__ == "__main__":
    main()
