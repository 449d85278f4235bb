"""`flashinfer bench io`: how fast this disk is read, by size of read, reader and number of reads in flight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from flashinfer.bench.fio import Fio
    from flashinfer.bench.io_figures import Figures, Measurement, Result
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
    pattern: Annotated[list[str] | None, typer.Option(help="random or sequential. (default: both)")] = None,
    fio: Annotated[
        bool | None, typer.Option("--fio/--no-fio", help="Let fio read the same in turn. (default: where installed)")
    ] = None,
    buffered: Annotated[bool, typer.Option("--buffered", help="Read through the page cache instead.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw speed against size of read (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure random and sequential reads for each size, reader and number of reads in flight, and fio beside them."""
    from rich.console import Console
    from rich.markup import escape

    from flashinfer.bench import io, io_figures, io_plot
    from flashinfer.bench.io_file import file_to_read
    from flashinfer.bench.place import place_of
    from flashinfer.cli.options import usage_errors
    from flashinfer.units import parse_size

    with usage_errors():
        size = parse_size(file_size)
        combinations = io.all_combinations(
            [parse_size(c) for c in chunk] if chunk else io.CHUNKS,
            threads or io.THREADS,
            [io_figures.reader_named(r) for r in reader or ["auto"]],
            [io_figures.pattern_named(p) for p in pattern or io_figures.PATTERNS],
        )
    if plot is not None:
        io_plot.check_plot(plot)
    with Console(stderr=True, highlight=False).status("") as status:

        def progress(text: str) -> None:
            status.update(escape(text))

        with file_to_read(path, size, progress) as file:
            place = place_of(file)
            beside = _fio(file, fio, buffered)
            version = None if beside is None else beside.version()
            with usage_errors():
                measured = io.measure(
                    file, combinations, seconds=seconds, rounds=rounds, direct=not buffered,
                    rival=None if beside is None else beside.slice, progress=progress,
                )  # fmt: skip
    curve = io_figures.fit_curve(measured.results, max(c.threads for c in combinations))
    if plot is not None:
        io_plot.draw(plot, measured.results, f"{place.device}, {place.filesystem}")
    if as_json:
        print(json.dumps(_as_json(measured, place, curve, version)))
        return
    out = Console(highlight=False, soft_wrap=True)
    for name in dict.fromkeys(c.pattern for c in combinations):
        out.print(_table(name, [r for r in measured.results if r.combination.pattern == name]))
    for line in _remarks(measured, place, curve, version):
        out.print(line, markup=False)


def _fio(file: Path, asked: bool | None, buffered: bool) -> Fio | None:
    """fio where it is asked for, or not forbidden and there. Raises typer.BadParameter."""
    from flashinfer.bench.fio import Fio, find_fio

    if asked is False or (buffered and not asked):
        return None
    if buffered:
        raise typer.BadParameter("--fio compares direct reads: leave --buffered out")
    program = find_fio()
    if program is None and asked:
        raise typer.BadParameter("--fio needs fio on the PATH: install it, or leave the option out")
    return None if program is None else Fio(program, file)


def _as_json(measured: Measurement, place: Place, curve: DiskCurve | None, fio: str | None) -> dict[str, Any]:
    from dataclasses import asdict

    rows = [asdict(result) for result in measured.results]
    return {
        "schema_version": 1,
        "command": "bench io",
        **asdict(place),
        **asdict(measured),
        "cache_bypassed": _bypassed(measured),
        "fio": fio,
        "results": [row.pop("combination") | row for row in rows],
        "disk_curve": None if curve is None else asdict(curve),
    }


def _bypassed(measured: Measurement) -> bool | None:
    return None if measured.device_share is None else measured.device_share >= BYPASSED


def _table(pattern: str, results: Sequence[Result]) -> Table:
    """It fits into 80 columns."""
    from rich.table import Table

    from flashinfer.units import format_size

    title = f"{pattern} reads; p50, p99: milliseconds of a read"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in ("chunk", "reader", "in flight", "MB/s", "range", "reads/s", "p50", "p99", "CPU s/GB"):
        table.add_column(name, justify="left" if name == "reader" else "right", no_wrap=True)
    for r in results:
        c = r.combination
        table.add_row(format_size(c.chunk), c.reader, str(c.threads), *_cells(r))
        if r.fio is not None:
            table.add_row("", "fio", "", *_cells(r.fio))
    return table


def _cells(f: Figures) -> list[str]:
    return [
        f"{f.mb_per_s:.0f}", f"{f.low:.0f}-{f.high:.0f}", f"{f.reads_per_s:.0f}", f"{1e3 * f.p50_s:.3g}",
        f"{1e3 * f.p99_s:.3g}", f"{f.cpu_s_per_gb:.2f}",
    ]  # fmt: skip


def _remarks(measured: Measurement, place: Place, curve: DiskCurve | None, fio: str | None) -> list[str]:
    share = measured.device_share
    if share is None:
        proof = "this system does not count the bytes fetched from the device: a cache may have answered"
    elif share >= BYPASSED:
        proof = (
            f"the kernel fetched {100 * share:.0f} % of the bytes asked from the device: the page cache was bypassed"
        )
    else:
        proof = f"CACHED: the kernel fetched only {100 * share:.0f} % of the bytes asked from the device"
    where = f"device: {place.device}; filesystem: {place.filesystem}; a file of {measured.file_bytes / 1e9:.2f} GB"
    lines = [where, measured.note, proof]
    if fio is not None:
        lines.append(_against(fio, measured.results))
    if curve is not None:
        lines.append(
            f"fit: {1e6 * curve.per_read_s:.1f} us a read and {curve.bytes_per_s / 1e9:.2f} GB/s; "
            f"reading through a gap of {curve.break_even_gap} bytes costs as much as another read"
        )
    return lines


def _against(fio: str, results: Sequence[Result]) -> str:
    """One line: ours over fio's, each round by round."""
    beside = [r.fio for r in results if r.fio is not None]
    if not beside:
        return f"not compared with {fio}: our reads were not direct"
    speeds, cpus = [100 * f.speed for f in beside], [f.cpu for f in beside]
    return (
        f"against {fio}, same size and reads in flight, in turn: at least {min(speeds):.0f} % of its MB/s "
        f"(at most {max(speeds):.0f} %), at most {max(cpus):.2f} times its CPU time per byte (at least {min(cpus):.2f})"
    )
