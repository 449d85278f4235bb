"""`flashinfer bench`: measure what the predictions rest on, and what comes out of them."""

from __future__ import annotations

import typer

from flashinfer.cli import bench_cache, bench_compare, bench_generate, bench_io

app = typer.Typer(no_args_is_help=True, help="Measure the disk, generation and the cache; compare with other programs.")
app.command("io")(bench_io.command)
app.command("generate")(bench_generate.command)
app.command("cache")(bench_cache.command)
app.command("compare")(bench_compare.command)
