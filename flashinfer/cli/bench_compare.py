"""`flashinfer bench compare`: the paper's ladder and the programs people use, interleaved under one cap."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashinfer.cli.options import DEFAULT_KV, KvOption, usage_errors

if TYPE_CHECKING:
    from flashinfer.bench.compare.lineup import Lineup

RESULTS = Path("benchmarks/results")


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store; calibrated, for all of the ladder.")],
    memory: Annotated[
        list[str] | None, typer.Option(metavar="SIZE", help="Cap on a whole run, e.g. 4GiB; may be given again.")
    ] = None,
    packed: Annotated[
        Path | None, typer.Option(metavar="STORE", help="The model as `pack` wrote it, for the lower rungs.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the store was packed from, for the other programs.")
    ] = None,
    peer_checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead: another checkpoint of the same shape stands in.")
    ] = None,
    gguf: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="For llama.cpp; quantised ones named like x-q4_0.gguf.")
    ] = None,
    gguf_quant: Annotated[
        list[str] | None, typer.Option(metavar="QUANT", help="Have llama.cpp make this quantisation, e.g. q4_0.")
    ] = None,
    peer_files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps what is made for the others. (default: peers in --out)")
    ] = None,
    peer_python: Annotated[str, typer.Option(metavar="PYTHON", help="Runs the other programs.")] = sys.executable,
    predictor: Annotated[
        str | None,
        typer.Option(metavar="NAME[:TARGET]", help="Of the ladder. (default: low-rank or router, where there is one)"),
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read. (default: built in)")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens everybody makes room for.")] = 384,
    tokens: Annotated[int, typer.Option("-n", min=1, help="Tokens to force, one at a time.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt before them.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this one; may be given again.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Say who would run, and who not and why.")] = False,
    kv_type: KvOption = DEFAULT_KV,
    probe: Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="For each look at the raw disk.")] = 1.0,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="For one run.")] = 600.0,
    no_cgroup: Annotated[bool, typer.Option("--no-cgroup", help="Run without cgroups: only ours keep a cap.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For compare.md, .json and .png. (default: benchmarks/results)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object instead of the Markdown.")] = False,
) -> None:
    """Compare the rungs of the paper's ladder, and other programs, on this machine under the same caps.

    Every run is a fresh process in a fresh memory cgroup of the cap, with cold files. All read the same text.
    """
    from flashinfer.bench.compare.lineup import line_up
    from flashinfer.bench.compare.markdown import markdown
    from flashinfer.bench.compare.prepare import prepare
    from flashinfer.bench.compare.script import forced_tokens
    from flashinfer.bench.compare.series import Series, check_groups
    from flashinfer.bench.compare.task import Task, Wanted, repeated

    _check_usage(checkpoint, peer_checkpoint, prompt_tokens + tokens, context, predictor)
    caps = _caps(memory or [], show)
    results = out or (RESULTS if RESULTS.is_dir() else Path())
    wanted = Wanted(
        store, packed, checkpoint or peer_checkpoint, peer_checkpoint is not None, tuple(gguf or ()),
        tuple(gguf_quant or ()), peer_files or results / "peers", peer_python, predictor, caps, tuple(only or ()),
    )  # fmt: skip
    if not show and not no_cgroup:
        check_groups(max(caps))
    opened, given = prepare(wanted, make=not show, say=_say)
    lineup = line_up(given)
    if show:
        _list(lineup)
        return
    prompt, script = forced_tokens(opened, text, prompt_tokens, tokens)
    task = Task(
        caps, prompt, script, min(context, opened.manifest.facts.context_length), kv_type.value, rounds, probe, timeout,
        not no_cgroup, wanted.folder,
    )  # fmt: skip
    result = Series(opened, lineup, task, repeated(wanted, task, text), _say).run(results)
    print(json.dumps(result) if as_json else markdown(result))


def _check_usage(
    checkpoint: Path | None, stand_in: Path | None, tokens: int, context: int, predictor: str | None
) -> None:
    """Raises typer.BadParameter."""
    from flashinfer.choice import parse_predictor

    if checkpoint and stand_in:
        raise typer.BadParameter("give --checkpoint or --peer-checkpoint, not both")
    if tokens > context:
        raise typer.BadParameter(f"a prompt and tokens of {tokens} in all do not fit --context {context}")
    with usage_errors("--predictor"):
        parse_predictor(predictor or "exact")


def _caps(memory: list[str], show: bool) -> tuple[int, ...]:
    """Bytes, none twice. Raises typer.BadParameter, CapTooLargeError."""
    from flashinfer.machine import memory_cap

    if not memory and not show:
        raise typer.BadParameter("give at least one cap: --memory SIZE")
    with usage_errors("--memory"):
        return tuple(dict.fromkeys(memory_cap(size) for size in memory))


def _say(text: str) -> None:
    """A line on stderr, with the time of day."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)


def _list(lineup: Lineup) -> None:
    """Who runs, and who does not and why."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "runs", ""):
        table.add_column(name, no_wrap=name == "")
    table.columns[2].no_wrap = False
    for c in lineup.contenders:
        table.add_row(c.name, "yes", c.what)
    for name, why in lineup.left_out.items():
        table.add_row(name, "no", why)
    out = Console(highlight=False)
    out.print(table, markup=False)
    for note in lineup.notes:
        out.print(note, markup=False)
