"""`flashinfer bench io`: how fast this disk is read, by size of read, reader and number of reads in flight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from flashinfer.bench.io import Measurement
    from flashinfer.bench.place import Place
    from flashinfer.config import DiskCurve

BYPASSED = 0.98
"""Share of the asked bytes that must have come from the device for the cache to count as bypassed."""


def command(
    path: Annotated[Path, typer.Argument(help="A store, a file, or a directory to make a test file in.")],
    file_size: Annotated[str, typer.Option(help="Size of the test file; ignored for a store or a file.")] = "1GiB",
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds per combination, over all rounds.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    chunk: Annotated[list[str] | None, typer.Option(help="Bytes per read; may be given several times.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Reads in flight; as often as wanted.")] = None,
    reader: Annotated[list[str] | None, typer.Option(help="auto, io_uring or threads; as often as wanted.")] = None,
    buffered: Annotated[bool, typer.Option("--buffered", help="Read through the page cache instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure random and sequential reads for each size, reader and number of reads in flight."""
    from rich.console import Console
    from rich.markup import escape

    from flashinfer.bench import io
    from flashinfer.bench.place import place_of
    from flashinfer.cli.options import usage_errors
    from flashinfer.units import parse_size

    with usage_errors():
        size = parse_size(file_size)
        chunks = [parse_size(c) for c in chunk] if chunk else io.CHUNKS
        combinations = io.all_combinations(
            chunks, threads or io.THREADS, [io.reader_name(r) for r in reader or ["auto"]]
        )
    with Console(stderr=True, highlight=False).status("") as status:

        def progress(text: str) -> None:
            status.update(escape(text))

        with io.file_to_read(path, size, progress) as file:
            place = place_of(file)
            with usage_errors():
                measured = io.measure(
                    file, combinations, seconds=seconds, rounds=rounds, direct=not buffered, progress=progress
                )
    curve = io.fit_curve(measured.results, max(c.threads for c in combinations))
    if as_json:
        print(json.dumps(_as_json(measured, place, curve)))
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(_table(measured))
    for line in _remarks(measured, place, curve):
        out.print(line, markup=False)


def _as_json(measured: Measurement, place: Place, curve: DiskCurve | None) -> dict[str, Any]:
    from dataclasses import asdict

    rows = [asdict(result) for result in measured.results]
    return {
        "schema_version": 1,
        "command": "bench io",
        **asdict(place),
        **asdict(measured),
        "cache_bypassed": _bypassed(measured),
        "results": [row.pop("combination") | row for row in rows],
        "disk_curve": None if curve is None else asdict(curve),
    }


def _bypassed(measured: Measurement) -> bool | None:
    return None if measured.device_share is None else measured.device_share >= BYPASSED


def _table(measured: Measurement) -> Table:
    from rich.table import Table

    from flashinfer.units import format_size

    title = f"reads of a file of {format_size(measured.file_bytes)}"
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True)  # fits into 80 columns
    for name in ("pattern", "chunk", "reader", "in flight", "MB/s", "range", "reads/s", "CPU s/GB"):
        table.add_column(name, justify="left" if name in ("pattern", "reader") else "right")
    for r in measured.results:
        c = r.combination
        table.add_row(
            c.pattern, format_size(c.chunk), c.reader, str(c.threads), f"{r.mb_per_s:.0f}", f"{r.low:.0f}-{r.high:.0f}",
            f"{r.reads_per_s:.0f}", f"{r.cpu_s_per_gb:.2f}",
        )  # fmt: skip
    return table


def _remarks(measured: Measurement, place: Place, curve: DiskCurve | None) -> list[str]:
    share = measured.device_share
    if share is None:
        proof = "this system does not count the bytes fetched from the device: a cache may have answered"
    elif share >= BYPASSED:
        proof = (
            f"the kernel fetched {100 * share:.0f} % of the bytes asked from the device: the page cache was bypassed"
        )
    else:
        proof = f"CACHED: the kernel fetched only {100 * share:.0f} % of the bytes asked from the device"
    lines = [f"device: {place.device}; filesystem: {place.filesystem}", measured.note, proof]
    if curve is not None:
        lines.append(
            f"fit: {1e6 * curve.per_read_s:.1f} us a read and {curve.bytes_per_s / 1e9:.2f} GB/s; "
            f"reading through a gap of {curve.break_even_gap} bytes costs as much as another read"
        )
    return lines
