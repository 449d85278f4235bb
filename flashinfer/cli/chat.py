"""`flashinfer chat`: hold a conversation under a memory cap."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashinfer.cli.options import (
    DEFAULT_BACKEND,
    DEFAULT_KV,
    DEFAULT_PPL,
    AdapterOption,
    BackendOption,
    ExpertsOption,
    KvOption,
    LogLevelOption,
    MaxPplOption,
    MemoryOption,
    PredictorOption,
    VramOption,
    WeightMemoryOption,
    parse_cap,
    parse_predictor_options,
    set_log_level,
)
from flashinfer.cli.run_options import (
    DEFAULT_OBJECTIVE,
    DEFAULT_READER,
    DEFAULT_THREADS,
    DEFAULT_WINDOW,
    Device,
    DeviceOption,
    MinPOption,
    ObjectiveOption,
    PenaltyOption,
    ReaderOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TemplateOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    WindowOption,
    check_text_options,
)
from flashinfer.config import RunConfig


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    system: SystemOption = None,
    chat_template: TemplateOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "-n", "--max-new-tokens", min=1, help="Most tokens of an answer. (default: what the context holds)"
        ),
    ] = None,
    memory: MemoryOption = None,
    weight_memory: WeightMemoryOption = None,
    vram: VramOption = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the conversation. (default: up to 4096, as the model takes)")
    ] = None,
    context_shift: Annotated[
        bool,
        typer.Option("--context-shift", help="When the context is full, forget the oldest turns, not the program."),
    ] = False,
    window: WindowOption = DEFAULT_WINDOW,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    io_objective: ObjectiveOption = DEFAULT_OBJECTIVE,
    reader: ReaderOption = DEFAULT_READER,
    threads: ThreadsOption = DEFAULT_THREADS,
    backend: BackendOption = DEFAULT_BACKEND,
    predictor: PredictorOption = RunConfig.predictor,
    max_ppl_increase: MaxPplOption = DEFAULT_PPL,
    adapter: AdapterOption = None,
    experts_per_token: ExpertsOption = None,
    kv_type: KvOption = DEFAULT_KV,
    device: DeviceOption = Device.CPU,
    log_level: LogLevelOption = None,
) -> None:
    """Hold a conversation under a memory cap. On a terminal, /help lists what else than a message can be typed.

    Where stdin is no terminal, each of its lines is a message; the answers go to stdout, a line's end after each.
    Sampling options not given come from the checkpoint's generation_config.json.
    """
    set_log_level(log_level)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    check_text_options(sampling, stop or [])
    cap = parse_cap(memory, weight_memory, vram)
    predictor, worse = parse_predictor_options(predictor, max_ppl_increase, experts_per_token)
    from flashinfer.cli.chat_loop import Talk, converse
    from flashinfer.generate import Chat, chat_template_of, load
    from flashinfer.text import ChatFormat

    template = chat_template_of(store, chat_template)
    with load(
        store, memory=cap.memory, weight_memory=cap.weight_memory, vram=cap.vram, context=context, window=window,
        io_objective=io_objective.value, reader=reader.value, threads=threads, device=device.value,
        backend=backend.value, predictor=predictor, max_ppl_increase=worse, adapter=adapter, kv_type=kv_type.value,
    ) as model:  # fmt: skip
        with Chat(model, ChatFormat(template, model.tokenizer), system=system, context_shift=context_shift) as chat:
            options = {"max_new_tokens": max_new_tokens, "stop": stop or [], **sampling}
            converse(Talk(model, chat, options, on_terminal=sys.stdin.isatty()))
        model.check_cap()
