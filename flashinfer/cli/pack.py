"""`flashinfer pack`: rewrite a checkpoint as a weight store."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Quant(StrEnum):
    """The codecs of `flashinfer.quant`, named here so that `--help` needs no numpy."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face directory with safetensors files.")],
    store: Annotated[Path, typer.Argument(help="Directory to make.")],
    quant: Annotated[
        Quant | None, typer.Option(help="Type of all matrices; by default each keeps its own.", show_default=False)
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="Layout file; by default the one of the architecture.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the store if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rewrite a checkpoint as a weight store, in bounded memory."""
    from flashinfer.cli.progress import byte_progress
    from flashinfer.pack import pack
    from flashinfer.units import format_size

    with byte_progress(f"packing {checkpoint.name}") as progress:
        report = pack(
            checkpoint, store, quant=quant.value if quant else None, layout=layout, force=force, progress=progress
        )
    if as_json:
        fields = {"path": str(report.path), "family": report.family, "seconds": round(report.seconds, 3)}
        sizes = {n: getattr(report, n) for n in ("bytes", "weight_bytes", "dense_bytes", "neuron_bytes")}
        print(json.dumps({"schema_version": 1, **fields, **sizes}))
        return
    rate = report.bytes / max(report.seconds, 1e-9)
    print(
        f"{report.path}: {report.family}, {format_size(report.bytes)} "
        f"({format_size(report.dense_bytes)} dense, {format_size(report.neuron_bytes)} neurons) "
        f"in {report.seconds:.1f} s, {format_size(rate)}/s"
    )
