"""`flashinfer generate`: continue a prompt under a memory cap."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashinfer.cli.options import (
    DEFAULT_BACKEND,
    DEFAULT_KV,
    DEFAULT_PPL,
    BackendOption,
    KvOption,
    LogLevelOption,
    MaxPplOption,
    MemoryOption,
    PredictorOption,
    WeightMemoryOption,
    parse_cap,
    parse_predictor_options,
    set_log_level,
    usage_errors,
)
from flashinfer.config import DEFAULT_NEW_TOKENS, CacheConfig, IoConfig, RunConfig
from flashinfer.errors import FlashInferError, PromptError
from flashinfer.trace import Trace
from flashinfer.units import format_size

if TYPE_CHECKING:
    from flashinfer.bench.basis import Basis
    from flashinfer.generate import Generation, Stream, TextModel
    from flashinfer.speed import Prediction
    from flashinfer.text import Tokenizer

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""


class Objective(StrEnum):
    """What the planner minimises."""

    TIME = "time"
    BYTES = "bytes"


class Device(StrEnum):
    """Where arithmetic runs."""

    CPU = "cpu"
    CUDA = "cuda"


_OBJECTIVE = Objective(IoConfig.objective)


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The text to continue.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("-f", "--file", help="Read the prompt from FILE (- is stdin); one final newline is dropped."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = DEFAULT_NEW_TOKENS,
    memory: MemoryOption = None,
    weight_memory: WeightMemoryOption = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt and continuation together. (default: what the prompt and -n need)"),
    ] = None,
    window: Annotated[
        int, typer.Option(min=0, help="Tokens whose neurons the cache tries to keep.")
    ] = CacheConfig.window,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the K most probable tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the most probable tokens that sum to P.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw among tokens at least P times as probable as the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 avoids tokens seen before.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    io_objective: Annotated[Objective, typer.Option(help="time: fastest; bytes: fewest bytes read.")] = _OBJECTIVE,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0 is all cores.")] = RunConfig.threads,
    backend: BackendOption = DEFAULT_BACKEND,
    predictor: PredictorOption = RunConfig.predictor,
    max_ppl_increase: MaxPplOption = DEFAULT_PPL,
    kv_type: KvOption = DEFAULT_KV,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    session: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the conversation in FILE; continue it where FILE exists.")
    ] = None,
    context_shift: Annotated[
        bool,
        typer.Option("--context-shift", help="When the context is full, go on with its newest half instead of ending."),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a timeline to FILE, for ui.perfetto.dev or chrome://tracing."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record-activations", metavar="FILE", help="Write to FILE who was needed, for `flashinfer bench cache`."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of text.")] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Continue a prompt under a memory cap; the text goes to stdout, a summary to stderr.

    The prompt comes from -p, -f or stdin. Sampling options not given come from the checkpoint's
    generation_config.json; naming --temperature, --top-k, --top-p or --min-p asks for sampling.
    """
    set_log_level(log_level)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    stops = stop or []
    _check_options(sampling, stops)
    files = [path for path in (trace, session, record) if path is not None]
    if len(set(files)) < len(files):
        raise typer.BadParameter("--trace, --session and --record-activations each need a file of their own")
    cap, (predictor, worse) = parse_cap(memory, weight_memory), parse_predictor_options(predictor, max_ppl_increase)
    resumed = session is not None and session.exists()
    text = read_prompt(prompt, file, optional=resumed)
    from flashinfer.generate import load, load_conversation, store_id
    from flashinfer.store import open_store

    past = load_conversation(session, store_id(open_store(store).manifest)).tokens if session and resumed else ()

    def room(tokenizer: Tokenizer) -> int:
        return len(past) + len(tokenizer.encode(text)) + max_new_tokens

    with Trace(trace) if trace else nullcontext() as timeline, load(
        store, memory=cap.memory, weight_memory=cap.weight_memory, context=context or room, window=window,
        io_objective=io_objective.value, threads=threads, device=device.value, backend=backend.value,
        predictor=predictor, max_ppl_increase=worse, kv_type=kv_type.value, trace=timeline,
    ) as model, _recording(record, store, model):  # fmt: skip
        stream = model.stream(
            text, max_new_tokens=max_new_tokens, stop=stops, session=session, context_shift=context_shift, **sampling
        )
        result = _drain(stream) if as_json else _print_pieces(stream)
        basis = _basis(store, RunConfig(backend=backend.value, threads=threads))
        predicted = model.predict(basis.disk, basis.rates, prompt_tokens=len(result.prompt_tokens))
        if as_json:
            print(json.dumps(_report(model, result, predicted, basis), ensure_ascii=False))
        print(summary(model, result, predicted, basis) + _place_note(store), file=sys.stderr)
        model.check_cap()


@contextmanager
def _recording(file: Path | None, store: Path, model: TextModel) -> Iterator[None]:
    """Record what the model needs while the block runs, where a file for it is given."""
    if file is None:
        yield
        return
    from flashinfer.recording import Recorder, header_of
    from flashinfer.store import open_store

    with Recorder(file, header_of(open_store(store).manifest, model.choice.kind)) as recorder:
        model.observe(recorder)
        yield


def read_prompt(prompt: str | None, file: Path | None, *, optional: bool = False) -> str:
    """The prompt from the one source that was named, or from stdin; `optional` lets it be empty.

    Raises:
        typer.BadParameter: two sources, or none.
        PromptError: it is empty, or not UTF-8.
        OSError: the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise typer.BadParameter("give -p or -f, not both")
    if prompt is None:
        if file is None and optional and sys.stdin.isatty():
            return ""
        if file is None and sys.stdin.isatty():
            raise typer.BadParameter("there is no prompt: give -p TEXT, -f FILE, or text on stdin")
        piped = file is None or str(file) == "-"
        data = sys.stdin.buffer.read() if file is None or piped else file.read_bytes()
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise PromptError(f"the prompt in {'stdin' if piped else file} is not UTF-8 (byte {e.start})") from e
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt and not optional:
        raise PromptError("the prompt is empty; give at least one word to continue")
    return prompt


def summary(model: TextModel, result: Generation, predicted: Prediction, basis: Basis) -> str:
    """One line: speed and bytes read per token, actual and predicted, hit rate and peak memory of a run."""
    from flashinfer.backend import has_native
    from flashinfer.machine import peak_resident_bytes

    t, decode = result.timings, model.ledger.decode
    times = "once" if result.context_shifts == 1 else f"{result.context_shifts} times"
    parts = [
        f"{len(result.tokens)} tokens ({result.finish_reason})",
        *([f"context shifted {times}"] if result.context_shifts else []),
        f"first after {t.first_token:.2f} s (predicted {predicted.first_token_seconds:.2f})",
        f"then {t.decode_tokens_per_second:.3g} tokens/s (predicted {predicted.tokens_per_second:.3g})",
        f"{format_size(decode.bytes_per_token)} read per token (predicted {format_size(predicted.flash_bytes)})",
        f"hit rate {decode.hit_rate:.1%}",
        *([model.choice.note] if model.choice.note else []),
        *(["keys and values rounded to f16"] if model.plan.kv_type == "f16" else []),
        f"peak memory {format_size(peak_resident_bytes())}",
    ]
    slower = "" if has_native() else "; computed by torch: the native core, which is faster, was not built"
    return f"{', '.join(parts)}; {_foundation(predicted, basis)}{slower}"


def _foundation(predicted: Prediction, basis: Basis) -> str:
    """What a prediction rests on."""
    disk = "measured" if basis.disk_measured else "default (`flashinfer plan` measures it)"
    neurons = f", firing {predicted.firing.source}" if predicted.firing.density < 1 else ""
    return f"predicted with the disk curve {disk}{neurons}"


def _basis(store: Path, run: RunConfig) -> Basis:
    """What predictions rest on here: figures measured before, or the defaults. Nothing is measured now."""
    from flashinfer.bench.basis import DEFAULT_BASIS, known_basis
    from flashinfer.store import open_store

    try:
        return known_basis(open_store(store), run)
    except (FlashInferError, OSError):  # it was there a moment ago: no reason to lose what was generated
        return DEFAULT_BASIS


def _place_note(store: Path) -> str:
    """What is to be known of the place the store lies in, if anything is."""
    from flashinfer.bench.place import KINDS, place_of

    try:
        what, advice = KINDS[place_of(store).kind]
    except OSError:
        return ""
    return f"; the store lies on {what}: {advice}" if advice else ""


def _check_options(sampling: dict[str, Any], stops: list[str]) -> None:
    from flashinfer.generate import Sampler, StopStrings
    from flashinfer.text import GenerationDefaults

    with usage_errors():
        Sampler(GenerationDefaults().sampling(**sampling))
        StopStrings(stops)


def _drain(stream: Stream) -> Generation:
    for _ in stream:
        pass
    return stream.result


def _print_pieces(stream: Stream) -> Generation:
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
    return stream.result


def _report(model: TextModel, result: Generation, predicted: Prediction, basis: Basis) -> dict[str, Any]:
    from flashinfer.machine import peak_resident_bytes

    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(result),
        "ledger": model.ledger.to_json(),
        "plan": model.plan.to_json(),
        "predictor": {"kind": model.choice.kind, "approximation": model.choice.note or None},
        "effective_window": model.effective_window,
        "peak_memory": peak_resident_bytes(),
        "predicted": predicted.to_json() | {"basis": basis.to_json()},
    }
