"""`flashinfer eval`: perplexity, and what predictors cost in quality and save in bytes."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashinfer.cli.options import (
    DEFAULT_BACKEND,
    DEFAULT_KV,
    DEFAULT_PPL,
    AdapterOption,
    BackendOption,
    KvOption,
    LogLevelOption,
    MaxPplOption,
    MemoryOption,
    VramOption,
    WeightMemoryOption,
    parse_cap,
    parse_predictor_options,
    set_log_level,
    usage_errors,
)
from flashinfer.cli.run_options import Device, Objective
from flashinfer.config import TILE_TOKENS, CacheConfig, IoConfig, RunConfig
from flashinfer.errors import CapTooSmallError, StoreError

if TYPE_CHECKING:
    from flashinfer.bench.generate import Sample
    from flashinfer.store import Facts, Store
    from flashinfer.text import Tokenizer
    from flashinfer.tune.candidates import Candidates
    from flashinfer.tune.judge import Setup
    from flashinfer.tune.perplexity import Ids, Protocol

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""
LONGEST = 1024
"""Context when nobody says, if the model's own is not smaller."""
PROMPT = 64
"""Tokens of the text before those whose decoding is measured."""
_OBJECTIVE = Objective(IoConfig.objective)


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.")],
    predictor: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:TARGET]", help="Judge this predictor; may be given again. (default: exact)"),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Judge every calibrated level of the store, too.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|STORE",
            help="Compare with exact, certified or all, or with another STORE of the model, as packed in another type. "
            "(default: exact, for approximations)",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use, from its start.")] = 4096,
    context: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of a window, BOS included. (default: up to {LONGEST})")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from one window to the next. (default: windows do not overlap)"),
    ] = None,
    decode_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens decoded one by one to measure what is read; 0 measures nothing.")
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of that, all predictors in each.")] = 3,
    greedy_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of each greedy continuation that is compared; 0 compares none.")
    ] = 32,
    memory: MemoryOption = None,
    weight_memory: WeightMemoryOption = None,
    vram: VramOption = None,
    window: Annotated[
        int, typer.Option(min=0, help="Tokens whose neurons the cache tries to keep.")
    ] = CacheConfig.window,
    io_objective: Annotated[Objective, typer.Option(help="time: fastest; bytes: fewest bytes read.")] = _OBJECTIVE,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0 is all cores.")] = RunConfig.threads,
    backend: BackendOption = DEFAULT_BACKEND,
    kv_type: KvOption = DEFAULT_KV,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    max_ppl_increase: MaxPplOption = DEFAULT_PPL,
    adapter: AdapterOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw quality against bytes to FILE (.png, .svg, .pdf); needs matplotlib."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Perplexity of a text; of predictors also their recall, divergence from exact, bytes and time per token.

    A text is scored in windows of --context tokens that begin every --stride tokens, each with BOS where the tokenizer
    puts one before a text; each token is scored once.
    """
    set_log_level(log_level)
    cap = parse_cap(memory, weight_memory, vram)
    worse = parse_predictor_options(RunConfig.predictor, max_ppl_increase)[1]
    other = _other_store(against)
    for name in (*(predictor or ()), *([against] if against and other is None else ())):
        parse_predictor_options(name, max_ppl_increase)
    if plot is not None and not decode_tokens:
        raise typer.BadParameter("--plot shows bytes per token: give --decode-tokens")
    run = RunConfig(
        io=IoConfig(objective=io_objective.value), cache=CacheConfig(window=window), backend=backend.value,
        threads=threads, max_ppl_increase=worse, kv_type=kv_type.value, adapter=adapter,
    )  # fmt: skip
    from flashinfer.cli.eval_report import notes, points, report, table
    from flashinfer.cli.progress import token_progress
    from flashinfer.store import open_store
    from flashinfer.text import load_tokenizer
    from flashinfer.tune.candidates import Candidates
    from flashinfer.tune.evaluate import evaluate
    from flashinfer.tune.greedy import prompts_of
    from flashinfer.tune.judge import Setup, check_peak
    from flashinfer.tune.plot import BYTES, check_plot, draw
    from flashinfer.tune.text import read_tokens

    opened = open_store(store)
    tokenizer = load_tokenizer({name: opened.path_of(entry) for name, entry in opened.manifest.text.items()})
    who = _candidates(opened, predictor or (), None if other else against, sweep, worse)
    if other is not None:
        _check_alike(opened, other)
        who = Candidates("exact", who.names)
    protocol = _protocol(opened.manifest.facts, tokenizer, tokens, context, stride)
    if plot is not None:
        check_plot(plot)
    found = read_tokens(text, tokenizer, tokens, least=protocol.room)
    del tokenizer  # its memory is the model's from here on
    prompts = prompts_of(found.ids, protocol, greedy_tokens)
    setup = Setup(protocol, prompts, cap, run, device.value, BYTES if plot else 0)
    with token_progress() as progress:
        judged = evaluate(opened, found.ids, who, setup, progress, reference=other)
        prompt, script = stretch(found.ids, protocol, decode_tokens)
        runs = [(other if other is not None and n == 0 else opened, q.asked) for n, q in enumerate(judged)]
        costs = _decode_costs(runs, prompt, script, setup, rounds, progress)
    label = other.root.name if other is not None else who.against
    rows = report(judged, costs, label, prompts.tokens)
    about = {
        "text": found.about(),
        "protocol": protocol.to_json() | {"tokens": protocol.scored(len(found.ids))},
        "decode": {"prompt": len(prompt), "tokens": len(script), "rounds": rounds} if script else None,
    }
    if plot is not None:
        draw(plot, points(rows), f"{store.name}, {protocol.scored(len(found.ids))} tokens of {text.name}")
    if as_json:
        from flashinfer.machine import peak_resident_bytes

        head = {"schema_version": SCHEMA_VERSION, "command": "eval", "against": label}
        print(json.dumps(head | about | {"rows": rows, "peak_memory": peak_resident_bytes()}))
    else:
        from rich.console import Console

        out = Console(highlight=False, soft_wrap=True)
        out.print(table(rows))
        for line in notes(rows, about):
            out.print(line, markup=False)
    check_peak(cap)


def stretch(ids: Ids, protocol: Protocol, tokens: int) -> tuple[list[int], list[int]]:
    """From the beginning of a text: a prompt with the protocol's BOS, and the tokens after it that are decoded, which
    together fit the context."""
    tokens = min(tokens, protocol.context // 2)
    length = min(PROMPT, protocol.room - tokens)
    first = [] if protocol.bos is None else [protocol.bos]
    prompt = first + ids[:length].tolist()
    return prompt, ids[length : length + tokens].tolist()


def _candidates(
    store: Store, asked: Sequence[str], against: str | None, sweep: bool, max_ppl_increase: float
) -> Candidates:
    from flashinfer.tune.candidates import candidates

    with usage_errors("--against"):
        return candidates(
            store.manifest, store.calibration(), asked,
            against=against, sweep=sweep, max_ppl_increase=max_ppl_increase,
        )  # fmt: skip


def _protocol(facts: Facts, tokenizer: Tokenizer, tokens: int, context: int | None, stride: int | None) -> Protocol:
    """As asked for, else windows that do not overlap, as long as the model and the tokens allow, up to LONGEST."""
    from flashinfer.tune.perplexity import Protocol, bos_of

    bos = bos_of(tokenizer)
    context = context or min(LONGEST, facts.context_length, tokens + (bos is not None))
    with usage_errors("--context, --stride"):
        protocol = Protocol(context, stride or context - (bos is not None), bos)
    if tokens < protocol.room:
        raise typer.BadParameter(f"{tokens} --tokens are less than a window of {protocol.room}")
    return protocol


def _other_store(against: str | None) -> Store | None:
    """The store `against` names, None where it names a predictor."""
    from flashinfer.store import open_store

    if against is None or not (os.sep in against or Path(against).is_dir() or Path(against).suffix == ".flash"):
        return None
    return open_store(Path(against))


def _check_alike(store: Store, other: Store) -> None:
    """Raises StoreError where the two cannot be asked the same: another vocabulary, or a shorter context."""
    ours, theirs = store.manifest.facts, other.manifest.facts
    for name, what in (("vocab_size", "tokens in the vocabulary"), ("context_length", "tokens of context")):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            raise StoreError(f"{store.root} has {a} {what}, {other.root} has {b}: they are not of one model")


def _decode_costs(
    runs: Sequence[tuple[Store, str]], prompt: Sequence[int], script: Sequence[int], setup: Setup, rounds: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any] | None]:  # fmt: skip
    """What decoding the script reads and takes: medians, per token. Every predictor is run in each round."""
    if not script:
        return [None] * len(runs)
    from flashinfer.bench.generate import Setting, run_setting, summary

    def measured(store: Store, name: str, chunk: int) -> Sample:
        setting, run = Setting("cached", setup.run.io.objective, name), replace(setup.run, prefill_chunk=chunk)
        gc.collect()  # what is left of the model before would count against this one
        try:
            return run_setting(store, setting, prompt, script, run, setup.cap, setup.device)
        except CapTooSmallError:
            if chunk < 2 * TILE_TOKENS:
                raise
            return measured(store, name, chunk // 2)

    samples: list[list[Sample]] = [[] for _ in runs]
    for done in range(rounds):
        progress("decoding, rounds", done, rounds)
        for (store, name), kept in zip(runs, samples, strict=True):
            kept.append(measured(store, name, setup.run.prefill_chunk))
    return [summary(s) for s in samples]
