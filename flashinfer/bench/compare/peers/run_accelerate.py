"""transformers with accelerate's disk offload: what does not fit is read from the checkpoint when it is used."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from typing import Any

import accelerate
import numpy as np
import numpy.typing as npt
import torch
import transformers

from . import report

ROOM = 0.25
"""Share of the cap that is left for activations and for the layer on its way: accelerate plans weights alone."""


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:

        def load() -> report.Step:
            model, past = _open(job, folder), None

            @torch.no_grad()
            def step(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
                nonlocal past
                out = model(input_ids=torch.tensor([list(tokens)]), past_key_values=past, use_cache=True)
                past = out.past_key_values
                logits: npt.NDArray[np.float32] = out.logits[0, -1].float().numpy()
                return logits

            return step

        report.run(load, job)
    report.end(f"{accelerate.__version__} (transformers {transformers.__version__})")


def _open(job: dict[str, Any], folder: str) -> Any:
    """`device_map="auto"` with what the cap leaves beside the interpreter and its libraries."""
    cap = job["cap"]
    room = max(1 << 20, int(cap * (1 - ROOM)) - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float16, device_map="auto", max_memory={"cpu": room}, offload_folder=folder
    )
    return model.eval()


if __name__ == "__main__":
    main()
