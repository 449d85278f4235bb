"""The plain loop of `loop.py`; needs torch only."""

from __future__ import annotations

from pathlib import Path

import torch

from . import report
from .loop import Loop


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()
    torch.set_num_threads(job["threads"])

    def load() -> report.Step:
        model = Loop(Path(job["model"]), job["context"])
        return lambda tokens: model.step(tokens).numpy()

    report.run(load, job)
    report.end(torch.__version__)


if __name__ == "__main__":
    main()
