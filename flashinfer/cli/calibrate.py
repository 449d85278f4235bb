"""`flashinfer calibrate`: learn from a text who fires, and write it into the store; or quantise the store by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flashinfer.cli.options import (
    DEFAULT_BACKEND,
    DEFAULT_PPL,
    BackendOption,
    LogLevelOption,
    MemoryOption,
    parse_cap,
    set_log_level,
    usage_errors,
)
from flashinfer.cli.run_options import Device
from flashinfer.config import RunConfig

if TYPE_CHECKING:
    from flashinfer.store import Level
    from flashinfer.tune.calibrate import Report
    from flashinfer.tune.options import Making

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""
MAKING = ("certified", "low-rank", "threshold")


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text like what the model will write.")],
    memory: MemoryOption = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Make this one: certified, low-rank, threshold. (default: what suits)"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the text to learn from.")] = 16384,
    held_out: Annotated[int, typer.Option(min=32, help="Tokens after them to judge by.")] = 2048,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a window of the text, BOS included.")] = 256,
    recall: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Share of firing neurons low-rank names.")] = 0.95,
    over: Annotated[float, typer.Option(min=1, help="Neurons low-rank may name for each that fires.")] = 3.0,
    budget: Annotated[
        str, typer.Option(metavar="SHARE", help="Of the weights' bytes, for low-rank predictors.")
    ] = "5%",
    level: Annotated[
        list[float] | None,
        typer.Option(
            min=0.01, max=0.9999, help="Judge this recall (low-rank) or density (threshold); may be repeated."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of neurons thresholds keep. (default: from perplexity)")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            show_default=False,
            help="Instead, put matrices into other codecs, as `pack --quant` does: int4, ffn=nf4,attn=int8, ...",
        ),
    ] = None,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="With --quant: round so that errors make up for each other.")
    ] = False,
    act_order: Annotated[bool, typer.Option(help="With --gptq: what has the largest inputs first.")] = True,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase",
            metavar="SHARE",
            show_default=False,
            help="What thresholds may cost in perplexity. (default: "
            f"{DEFAULT_PPL}) With --quant: what it may cost; what loses most is kept in more bits.",
        ),
    ] = None,
    order: Annotated[bool, typer.Option(help="Move neurons next to those they fire with.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0 is all cores.")] = RunConfig.threads,
    backend: BackendOption = DEFAULT_BACKEND,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    seed: Annotated[int, typer.Option(help="Of what is drawn while predictors are trained.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Learn from a text which neurons fire, and write predictors, statistics and a better neuron order into the store.
    With --quant instead put its matrices into other codecs, and judge by the text what that costs.

    The store changes all at once in the end. A calibration that was interrupted goes on where it was when the same
    command is given again.
    """
    set_log_level(log_level)
    cap = parse_cap(memory, None)
    from flashinfer.tune.options import Options
    from flashinfer.units import parse_share

    run = RunConfig(backend=backend.value, threads=threads)
    with usage_errors("--max-ppl-increase"):
        worse = None if max_ppl_increase is None else parse_share(max_ppl_increase)
    if quant is not None:
        from flashinfer.cli.calibrate_quant import quantise_store
        from flashinfer.tune.quantising import QuantOptions

        if predictor:
            raise typer.BadParameter("--quant and --predictor exclude each other: quantise first", param_hint="--quant")
        how = QuantOptions(quant, gptq, act_order, worse, tokens, held_out, context)
        quantise_store(store, text, how, cap=cap, run=run, device=device.value, as_json=as_json)
        return
    if gptq:
        raise typer.BadParameter("it rounds weights to a codec: say which with --quant", param_hint="--gptq")
    for name in predictor or ():
        if name not in MAKING:
            raise typer.BadParameter(f"calibration makes {', '.join(MAKING)}, not {name!r}", param_hint="--predictor")
    with usage_errors("--budget"):
        share = parse_share(budget)
    options = Options(
        tokens=tokens, held_out=held_out, context=context, recall=recall, over=over, share=share, density=density,
        recalls=tuple(level or Options.recalls), densities=tuple(level or Options.densities),
        make=cast("tuple[Making, ...]", tuple(predictor or ())), order=order, seed=seed,
        max_ppl_increase=Options.max_ppl_increase if worse is None else worse,
    )  # fmt: skip
    from flashinfer.cli.progress import token_progress
    from flashinfer.tune.calibrate import calibrate
    from flashinfer.tune.judge import check_peak

    with token_progress() as progress:
        report = calibrate(store, text, options, cap=cap, run=run, device=device.value, progress=progress)
    if as_json:
        print(json.dumps(_as_json(report)))
    else:
        for line in _lines(report):
            print(line)
    if report.resumed:
        print("went on with what an earlier calibration had done", file=sys.stderr)
    check_peak(cap)


def _as_json(report: Report) -> dict[str, Any]:
    import msgspec

    m = report.manifest
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "calibrate",
        "predictor_bytes": m.predictor_bytes(),
        "weight_bytes": m.weight_bytes(),
        "resumed": report.resumed,
        "calibration": msgspec.to_builtins(report.calibration),
    }


def _lines(report: Report) -> list[str]:
    """For people: what was learnt, and what each level costs."""
    from flashinfer.units import format_size

    c, m = report.calibration, report.manifest
    lines = [f"calibrated on {c.tokens} tokens" + (f", judged by {c.held_out} others" if c.held_out else "")]
    for kind, layers in c.statistics.items():
        density = sum(s.density for s in layers) / len(layers)
        lines.append(f"  {kind}: a token needs {density:.1%} of the neurons")
    size = m.predictor_bytes()
    if size:
        lines.append(f"  predictors: {format_size(size)}, {size / m.weight_bytes():.1%} of the weights")
    lines += [_level_line(level, n in c.chosen.values()) for n, level in enumerate(c.levels)]
    return lines


def _level_line(level: Level, chosen: bool) -> str:
    worse = level.perplexity / level.exact_perplexity - 1.0
    mark = " <- used when nobody says" if chosen else ""
    return (
        f"  --predictor {level.predictor}:{level.target:g}: names {level.density:.1%} of the neurons, "
        f"perplexity {level.perplexity:.4g} ({worse:+.2%}){mark}"
    )
