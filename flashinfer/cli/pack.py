"""`flashinfer pack`: rewrite a checkpoint as a weight store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face directory (safetensors or .bin), or a .gguf file.")],
    store: Annotated[Path, typer.Argument(help="Directory to make.")],
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="CODEC|KIND=CODEC,...",
            show_default=False,
            help="What matrices are packed as: nf4, int4, int8, f16, ... or ffn=nf4,attn=int8,head=f16; "
            "by default each keeps its type.",
        ),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="Layout file; by default the one of the architecture.", show_default=False)
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Pack NaN and infinity as they are, rather than refuse them.")
    ] = False,
    delta: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of weight differences to add (Vicuna and the like).", show_default=False),
    ] = None,
    merge_adapter: Annotated[
        Path | None, typer.Option(help="Directory of a LoRA adapter to merge, as peft saves it.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the store if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rewrite a checkpoint as a weight store, in bounded memory."""
    from flashinfer.cli.options import usage_errors
    from flashinfer.cli.progress import byte_progress
    from flashinfer.pack import pack
    from flashinfer.pack.recipe import parse_recipe
    from flashinfer.text import check_files
    from flashinfer.units import format_size

    with usage_errors("--quant"):
        parse_recipe(quant)

    with byte_progress(f"packing {checkpoint.name}") as progress:
        report = pack(
            checkpoint,
            store,
            quant=quant,
            layout=layout,
            delta=delta,
            merge_adapter=merge_adapter,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            check_text=lambda files, rows: check_files(files, rows, checkpoint),
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
