"""Opening a weight store as a `TextModel`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from flashinfer import machine
from flashinfer.config import CacheConfig, Cap, IoConfig, IoObjective, RunConfig
from flashinfer.generate.text_model import TextModel
from flashinfer.store import open_store
from flashinfer.text import Tokenizer, load_generation_defaults, load_tokenizer
from flashinfer.units import parse_cap_size


def load(
    store: str | Path,
    *,
    memory: int | str | None = None,
    weight_memory: int | str | None = None,
    context: int | Callable[[Tokenizer], int] | None = None,
    window: int = CacheConfig.window,
    io_objective: IoObjective = IoConfig.objective,
    threads: int = RunConfig.threads,
    device: str = "cpu",
) -> TextModel:
    """Open the weight store at `store` under a memory cap.

    Args:
        store: directory written by `flashinfer pack`.
        memory: cap on the whole process, in bytes or as text (`"4GiB"`, or `"50%"` of what this process may
            use); with neither cap, what the machine can spare.
        weight_memory: instead, a cap on every DRAM byte that holds a weight.
        context: tokens of prompt and continuation together; None is up to 4096, if the model takes them. A
            function is asked for what it wants room for once the tokenizer is there, up to the model's limit.
        window: tokens whose neurons the cache tries to keep.
        io_objective: `time` (fastest) or `bytes` (fewest bytes read).
        threads: compute threads; 0 means the cores this process may run on.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: an argument is out of its range.
        StoreError: the store, or the tokenizer in it, is missing or damaged.
        CapTooSmallError: the cap is below the model's floor.
        CapTooLargeError: `memory` is more than this process may use.
        DeviceError: the device is not there.
    """
    run = _run_config(window, io_objective, threads)
    if memory is not None and weight_memory is not None:
        raise ValueError("memory and weight_memory exclude each other: give one cap")
    if isinstance(context, int) and context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    cap = Cap(
        None if memory is None else machine.memory_cap(memory),
        None if weight_memory is None else parse_cap_size(weight_memory),
    )
    opened = open_store(store)
    files = {name: opened.path_of(entry) for name, entry in opened.manifest.text.items()}
    # before the engine: it measures what the process holds already, and the tokenizer is part of that
    tokenizer, defaults = load_tokenizer(files), load_generation_defaults(files)
    if callable(context):
        context = max(1, min(context(tokenizer), opened.manifest.facts.context_length))

    from flashinfer.engine import Model

    engine = Model.open(store, cap, context=context, run=run, device=device)
    try:
        return TextModel(engine, tokenizer, defaults)
    except BaseException:
        engine.close()
        raise


def _run_config(window: int, io_objective: IoObjective, threads: int) -> RunConfig:
    if window < 0:
        raise ValueError(f"window must be at least 0 tokens, not {window}")
    if threads < 0:
        raise ValueError(f"threads must be at least 0 (0 is all cores), not {threads}")
    if io_objective not in get_args(IoObjective):
        raise ValueError(f"io_objective must be time or bytes, not {io_objective!r}")
    return RunConfig(io=IoConfig(objective=io_objective), cache=CacheConfig(window=window), threads=threads)
