"""`flashinfer demo`: pack the embedded checkpoint, generate with half its weights in memory, show the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = "Once upon a time, there was a little girl named Lily. She"
MEASURED = 64
"""Tokens every mode decodes for the tables, where no fewer are written."""


def command(
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What the story starts with.")] = PROMPT,
    tokens: Annotated[int, typer.Option("-n", min=1, max=400, help="Tokens to write.")] = 160,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 1,
) -> None:
    """Pack a small trained model, write a story with half its weights in memory, and show what it cost."""
    import tempfile

    from rich.console import Console

    import flashinfer
    from flashinfer.generate import load
    from flashinfer.pack import pack
    from flashinfer.units import format_size

    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    checkpoint = Path(flashinfer.__file__).parent / "_demo"
    with tempfile.TemporaryDirectory(prefix="flashinfer-demo-") as folder:
        store = Path(folder) / "demo.flash"
        report = pack(checkpoint, store)
        size = report.weight_bytes
        err.print(f"packed {format_size(size)} of weights in {report.seconds:.1f} s; half of them may be in memory\n")
        with load(store, weight_memory=size // 2, io_objective="bytes") as model:
            err.print(f"[dim]{model.reader_note}[/dim]\n")
            out.print(prompt, end="")
            for piece in model.stream(prompt, max_new_tokens=tokens, temperature=0.6, top_p=0.95, seed=seed):
                out.print(piece, end="", markup=False)
            out.print("\n")
            ids = model.tokenizer.encode(prompt)
        _compare(out, err, store, ids, size, min(tokens, MEASURED))


def _compare(out: Console, err: Console, store: Path, ids: list[int], size: int, tokens: int) -> None:
    from flashinfer.bench.generate import COMPARISON, Setting, compare, summary
    from flashinfer.cli.bench_generate import comparison_table, kernel_check
    from flashinfer.config import Cap, RunConfig
    from flashinfer.units import format_size

    with err.status("measuring") as status:

        def measure(share: float, settings: tuple[Setting, ...]) -> list[dict[str, Any]]:
            cap = Cap(weight_memory=int(share * size))
            status.update(f"measuring under {format_size(share * size)}")
            samples = compare(store, ids, tokens=tokens, rounds=1, run=RunConfig(), cap=cap, settings=settings)
            return [summary(s) for s in samples]

        half = measure(0.5, COMPARISON)
        more = measure(0.75, COMPARISON[:2])
    about = f"{tokens} tokens, {format_size(size)} of weights"
    out.print(comparison_table(half, f"{about}, at most {format_size(size / 2)} of them in memory; per token"))
    out.print(comparison_table(more, f"{about}, at most {format_size(0.75 * size)} of them in memory; per token"))
    out.print(kernel_check(half + more))
    share = 100 * half[0]["bytes_read"] / half[-1]["bytes_read"]
    out.print(
        f"\nWith half its weights in memory the model reads {share:.0f} % of the bytes that reading everything takes.\n"
        "At this size reading everything is quick anyway (it is a few MB) and the time goes to bookkeeping;\n"
        "the gain appears when a token's weights take longer to read than to skip: models of several GB."
    )
