"""`flashinfer bench cache`: which records would have been in memory, by policy and budget, over a recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashinfer.cli.options import usage_errors
from flashinfer.config import CacheConfig

if TYPE_CHECKING:
    from rich.table import Table

    from flashinfer.bench.cache import Study

SCHEMA_VERSION = 1
BUDGETS = "5%,10%,20%,30%,40%,50%,60%,80%,100%"


def command(
    trace: Annotated[Path, typer.Argument(help="Written by `flashinfer generate --record-activations FILE`.")],
    store: Annotated[
        Path | None, typer.Option(help="Take the records, and the order of the neurons, of this store.")
    ] = None,
    bundles_per_record: Annotated[
        int | None, typer.Option(min=1, help="Instead: so many neurons to a record, in their order. (default: 1)")
    ] = None,
    budgets: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Slots, as shares of each layer's records.")
    ] = BUDGETS,
    window: Annotated[
        list[int] | None,
        typer.Option(min=0, help=f"Tokens kept whole; may be given again. (default: {CacheConfig.window})"),
    ] = None,
    skip: Annotated[int, typer.Option(min=0, help="First decode tokens that are not counted.")] = 0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take a recording that was cut short for as far as it is whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a recorded run through cache policies, at many budgets, with the best that is possible as the limit.

    Counted are the decode tokens. The prompt only warms the slots, which are empty at the start. Slots are the same
    share of the records in every layer.
    """
    from rich.console import Console

    from flashinfer.bench.cache import geometries, settings_for, study
    from flashinfer.recording import open_recording

    if store is not None and bundles_per_record is not None:
        raise typer.BadParameter("give --store or --bundles-per-record, not both")
    shares = _shares(budgets)
    recording = open_recording(trace, partial=partial)
    layout = geometries(recording, store, bundles_per_record or 1)
    settings = settings_for(list(dict.fromkeys(window or [CacheConfig.window])))
    with Console(stderr=True, highlight=False).status("") as status:
        done = study(recording, layout, shares=shares, settings=settings, skip=skip, progress=status.update)
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "command": "bench cache", **done.to_json()}))
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(_title(done), markup=False)
    out.print(_table(done))


def _shares(text: str) -> list[float]:
    """Ascending, none twice. Raises typer.BadParameter."""
    from flashinfer.units import parse_share

    with usage_errors("--budgets"):
        shares = sorted({parse_share(part.strip()) for part in text.split(",")})
        if shares[-1] > 1:
            raise ValueError(f"{shares[-1]:.0%} of the records is more than all of them; write e.g. 10%,50%")
        return shares


def _title(done: Study) -> str:
    size = f" of {done.record_bytes:.0f} bytes" if done.record_bytes else ""
    return (
        f"{done.tokens} decode tokens are counted, {done.warm} tokens before them warm the slots; a token needs "
        f"{done.needed / done.tokens:.1f} of {done.records} records{size}.\nRecords missed per token, and hit rate:"
    )


def _table(done: Study) -> Table:
    """A row per budget, a column per policy; six of them fit 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("slots", justify="right", no_wrap=True)
    for setting in dict.fromkeys(row.setting for row in done.rows):
        table.add_column(setting.name, justify="right", no_wrap=True)
    for share in dict.fromkeys(row.share for row in done.rows):
        cells = [_cell(done.missed(row), done.hit_rate(row)) for row in done.rows if row.share == share]
        table.add_row(f"{share:.3g}" if share < 0.01 else f"{share:.0%}", *cells)
    return table


def _cell(missed: float, hit_rate: float) -> str:
    return f"{missed:.{0 if missed >= 100 else 1}f} {hit_rate:4.0%}"
