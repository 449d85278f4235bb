"""llama.cpp on a mapped GGUF file, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from . import report


def main() -> None:
    """One run, reported on stdout."""
    job = report.job()

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
