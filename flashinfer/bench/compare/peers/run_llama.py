"""llama.cpp on a mapped GGUF file, through llama-cpp-python.

It copies some quantised matrices, reordered for its kernels, into memory of its own. Where the file is larger than the
cap it would be killed for that, so there it is told to use the file's pages as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from . import report


def keep_mapped() -> None:
    """No copies of weights from now on: what the defaults of a model's parameters say, and `Llama` has no word for."""
    defaults = api.llama_model_default_params

    def parameters() -> Any:
        found = defaults()
        found.use_extra_bufts = False
        return found

    api.llama_model_default_params = parameters


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()
    if job["cap"] is not None and Path(job["model"]).stat().st_size > job["cap"]:
        keep_mapped()

    def load() -> report.Step:
        model = llama_cpp.Llama(
            job["model"], n_ctx=job["context"], n_threads=job["threads"], n_threads_batch=job["threads"],
            use_mmap=True, use_mlock=False, n_gpu_layers=0, verbose=False,
        )  # fmt: skip
        vocab = model.n_vocab()

        def step(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
            model.eval(list(tokens))
            last = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            return np.ctypeslib.as_array(last, shape=(vocab,))

        return step

    report.run(load, job)
    report.end(llama_cpp.__version__)


if __name__ == "__main__":
    main()
