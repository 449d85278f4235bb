"""Opening a weight store as a `TextModel`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from flashinfer import machine
from flashinfer.choice import parse_predictor
from flashinfer.config import BackendName, CacheConfig, Cap, IoConfig, IoObjective, KvType, ReaderName, RunConfig
from flashinfer.generate.text_model import TextModel
from flashinfer.store import Store, open_store
from flashinfer.text import (
    ChatTemplate,
    Tokenizer,
    check_fit,
    load_chat_template,
    load_generation_defaults,
    load_tokenizer,
)
from flashinfer.trace import Trace
from flashinfer.units import parse_cap_size


def load(
    store: str | Path,
    *,
    memory: int | str | None = None,
    weight_memory: int | str | None = None,
    vram: int | str | None = None,
    context: int | Callable[[Tokenizer], int] | None = None,
    window: int = CacheConfig.window,
    io_objective: IoObjective = IoConfig.objective,
    reader: ReaderName = IoConfig.reader,
    threads: int = RunConfig.threads,
    device: str = "cpu",
    backend: BackendName = RunConfig.backend,
    predictor: str = RunConfig.predictor,
    max_ppl_increase: float = RunConfig.max_ppl_increase,
    kv_type: KvType = RunConfig.kv_type,
    adapter: str | Path | None = None,
    trace: Trace | None = None,
) -> TextModel:
    """Open the weight store at `store` under a memory cap.

    Args:
        store: directory written by `flashinfer pack`.
        memory: cap on the whole process, in bytes or as text (`"4GiB"`, or `"50%"` of what this process may
            use); with neither cap, what the machine can spare.
        weight_memory: instead, a cap on every DRAM byte that holds a weight.
        vram: cap on the memory of a device that has its own (`device="cuda"`), in bytes or as text; None is what is
            free there.
        context: tokens of prompt and continuation together; None is up to 4096, if the model takes them. A
            function is asked for what it wants room for once the tokenizer is there, up to the model's limit.
        window: tokens whose neurons the cache tries to keep.
        io_objective: `time` (fastest) or `bytes` (fewest bytes read).
        reader: `auto`, `io_uring`, `threads`, or `kvikio`, which reads straight to the memory of a GPU.
        threads: compute threads; 0 means the cores this process may run on.
        device: `cpu` or `cuda`.
        backend: what computes on the CPU: `native`, `torch`, or `auto` (the native core where it was built).
        predictor: who names the neurons a token needs. `exact` and `certified` give the same exact output; `low-rank`
            and `threshold` (also as `low-rank:0.98`, a level that was calibrated) approximate; `auto` takes the fastest
            that costs at most `max_ppl_increase`; `all` leaves nothing out.
        max_ppl_increase: share of perplexity `auto` may cost, as measured when the store was calibrated.
        kv_type: `f32`; `f16`: half the memory for keys and values, which are rounded; `int8`: a quarter (`int8g32`).
        adapter: a LoRA adapter to apply, as the directory peft saved; several can share a store, which stays as it is.
            With one, `auto` is exact: calibrated predictors belong to the store without it.
        trace: shows what happens in a timeline (`flashinfer.trace`); closing it is the caller's.

    Raises:
        ValueError: an argument is out of its range.
        StoreError: the store, or the tokenizer in it, is missing or damaged.
        CapTooSmallError: the cap, or `vram`, is below the model's floor.
        CapTooLargeError: `memory` is more than this process may use, or `vram` more than is free on the device.
        DeviceError: the device is not there, or `vram` or `reader` is for one and it has no memory of its own.
        PlatformError: the reader cannot read here.
        PredictorError: the store was not calibrated for that predictor, or not with the adapter.
        CheckpointError: the adapter is missing, damaged, for another model, or asks for more than a run can do.
    """
    run = RunConfig(
        io=IoConfig(objective=io_objective, reader=reader), cache=CacheConfig(window=window), backend=backend,
        kv_type=kv_type, threads=threads, predictor=predictor, max_ppl_increase=max_ppl_increase,
        adapter=None if adapter is None else Path(adapter),
    )  # fmt: skip
    _check_run(run)
    if memory is not None and weight_memory is not None:
        raise ValueError("memory and weight_memory exclude each other: give one cap")
    if isinstance(context, int) and context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    cap = Cap(
        None if memory is None else machine.memory_cap(memory),
        None if weight_memory is None else parse_cap_size(weight_memory),
        None if vram is None else parse_cap_size(vram),
    )
    opened = open_store(store)
    files = _text_files(opened)
    # before the engine: it measures what the process holds already, and the tokenizer is part of that
    tokenizer, defaults = load_tokenizer(files), load_generation_defaults(files)
    check_fit(tokenizer, opened.manifest.facts.vocab_size, opened.root)
    if callable(context):
        context = max(1, min(context(tokenizer), opened.manifest.facts.context_length))

    from flashinfer.engine import Model

    engine = Model.open(store, cap, context=context, run=run, device=device, trace=trace)
    try:
        return TextModel(engine, tokenizer, defaults)
    except BaseException:
        engine.close()
        raise


def chat_template_of(store: str | Path, chosen: str | None = None) -> ChatTemplate:
    """How the model in `store` wants conversations; `ChatFormat` puts it together with the model's tokenizer.

    chosen: the name of a built-in chat template, or a file; None is the checkpoint's own.

    Raises:
        ChatTemplateError: there is none, or the one named cannot be read.
        StoreError: a file of the store is damaged.
    """
    return load_chat_template(_text_files(open_store(store)), chosen)


def _text_files(store: Store) -> dict[str, Path]:
    return {name: store.path_of(entry) for name, entry in store.manifest.text.items()}


def _check_run(run: RunConfig) -> None:
    if run.cache.window < 0:
        raise ValueError(f"window must be at least 0 tokens, not {run.cache.window}")
    if run.threads < 0:
        raise ValueError(f"threads must be at least 0 (0 is all cores), not {run.threads}")
    parse_predictor(run.predictor)
    if not 0.0 <= run.max_ppl_increase < float("inf"):
        raise ValueError(f"max_ppl_increase must be a share of at least 0, not {run.max_ppl_increase}")
    choices: dict[str, tuple[str, Any]] = {
        "io_objective": (run.io.objective, IoObjective), "reader": (run.io.reader, ReaderName),
        "backend": (run.backend, BackendName), "kv_type": (run.kv_type, KvType),
    }  # fmt: skip
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise ValueError(f"{name} must be {' or '.join(get_args(kind))}, not {value!r}")
