"""AirLLM on the CPU: one layer in memory at a time. It writes a copy of the checkpoint by layers once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

import airllm
import numpy as np
import numpy.typing as npt
import torch

from . import report


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()
    torch.set_num_threads(job["threads"])

    def load() -> report.Step:
        with contextlib.redirect_stdout(sys.stderr):
            model = airllm.AutoModel.from_pretrained(
                job["model"], device="cpu", dtype=torch.float16, max_seq_len=job["context"],
                layer_shards_saving_path=job["shards"],
            )  # fmt: skip
        past = None

        @torch.no_grad()
        def step(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
            nonlocal past
            with contextlib.redirect_stdout(sys.stderr):
                out = model(input_ids=torch.tensor([list(tokens)]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits: npt.NDArray[np.float32] = out.logits[0, -1].float().numpy()
            return logits

        return step

    report.run(load, job)
    report.end(version("airllm"))


if __name__ == "__main__":
    main()
