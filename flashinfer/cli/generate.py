"""`flashinfer generate`: continue a prompt under a memory cap."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashinfer.cli.generate_report import basis_of, place_note, report, summary
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
from flashinfer.config import DEFAULT_NEW_TOKENS, RunConfig
from flashinfer.errors import PromptError
from flashinfer.trace import Trace

if TYPE_CHECKING:
    from flashinfer.generate import Generation, Stream, TextModel
    from flashinfer.text import Tokenizer, TurnEnd


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
    vram: VramOption = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt and continuation together. (default: what the prompt and -n need)"),
    ] = None,
    window: WindowOption = DEFAULT_WINDOW,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message; the chat template is applied to it.")
    ] = False,
    system: SystemOption = None,
    chat_template: TemplateOption = None,
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
    generation_config.json; naming --temperature, --top-k, --top-p or --min-p asks for sampling. With --chat the
    answer ends where the model ends its turn; `flashinfer chat` holds a conversation.
    """
    set_log_level(log_level)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    stops = stop or []
    check_text_options(sampling, stops)
    _check_chat_options(chat, system, chat_template, session)
    files = [path for path in (trace, session, record) if path is not None]
    if len(set(files)) < len(files):
        raise typer.BadParameter("--trace, --session and --record-activations each need a file of their own")
    cap = parse_cap(memory, weight_memory, vram)
    predictor, worse = parse_predictor_options(predictor, max_ppl_increase, experts_per_token)
    resumed = session is not None and session.exists()
    text = read_prompt(prompt, file, optional=resumed)
    from flashinfer.generate import chat_template_of, load
    from flashinfer.text import ChatFormat, TurnEnd, opening

    past = _past_tokens(session, store, adapter) if session and resumed else ()
    template = chat_template_of(store, chat_template) if chat else None

    @cache  # once: a chat template is rendered in a process of its own
    def asked(tokenizer: Tokenizer) -> tuple[str | list[int], TurnEnd]:
        if template is None:
            return text, TurnEnd()
        form = ChatFormat(template, tokenizer)
        return form.prompts([*opening(system), {"role": "user", "content": text}])[0], form.turn_end()

    def room(tokenizer: Tokenizer) -> int:
        prompt, _ = asked(tokenizer)
        return len(past) + len(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) + max_new_tokens

    with Trace(trace) if trace else nullcontext() as timeline, load(
        store, memory=cap.memory, weight_memory=cap.weight_memory, vram=cap.vram, context=context or room,
        window=window, io_objective=io_objective.value, reader=reader.value, threads=threads, device=device.value,
        backend=backend.value, predictor=predictor, max_ppl_increase=worse, adapter=adapter, kv_type=kv_type.value,
        trace=timeline,
    ) as model, _recording(record, store, model):  # fmt: skip
        start, end = asked(model.tokenizer)
        stream = model.stream(
            start, max_new_tokens=max_new_tokens, stop=[*stops, *end.texts], end_tokens=end.tokens, session=session,
            context_shift=context_shift, **sampling,
        )  # fmt: skip
        result = _drain(stream) if as_json else _print_pieces(stream)
        basis = basis_of(store, RunConfig(backend=backend.value, threads=threads), device.value)
        predicted = model.predict(basis.disk, basis.rates, prompt_tokens=len(result.prompt_tokens))
        if as_json:
            print(json.dumps(report(model, result, predicted, basis), ensure_ascii=False))
        print(summary(model, result, predicted, basis) + place_note(store), file=sys.stderr)
        model.check_cap()


def _past_tokens(session: Path, store: Path, adapter: Path | None) -> tuple[int, ...]:
    """What the conversation in that file has said so far."""
    from flashinfer.adapter import read_adapter
    from flashinfer.generate import load_conversation, store_id
    from flashinfer.store import open_store

    opened = open_store(store)
    identity = "" if adapter is None else read_adapter(adapter, opened).identity
    return load_conversation(session, store_id(opened.manifest, identity)).tokens


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


def _check_chat_options(chat: bool, system: str | None, template: str | None, session: Path | None) -> None:
    if not chat and (system is not None or template is not None):
        raise typer.BadParameter("--system and --chat-template are about messages: give --chat as well")
    if chat and session is not None:
        raise typer.BadParameter("--chat asks one question; to hold a conversation, use `flashinfer chat`")


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
