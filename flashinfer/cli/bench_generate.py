"""`flashinfer bench generate`: decoding with a cache, always-miss and naive, interleaved."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashinfer.cli.options import AdapterOption, MemoryOption, VramOption, WeightMemoryOption, parse_cap, usage_errors
from flashinfer.cli.run_options import Device, DeviceOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table


PROMPT = "Once upon a time, in a village by the sea, there lived an old clock maker who"


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    memory: MemoryOption = None,
    weight_memory: WeightMemoryOption = None,
    vram: VramOption = None,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue.")] = PROMPT,
    tokens: Annotated[int, typer.Option("-n", min=1, help="Tokens to decode in each run.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    predictor: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:TARGET]", help="Compare these predictors instead of modes; give it several times."),
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = Device.CPU,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Decode the same tokens in every mode (or with every predictor), in turn, and print medians.

    Every run opens the store anew, so nothing is cached from the run before; reads bypass the page cache.
    """
    from rich.console import Console

    from flashinfer.backend import open_backend
    from flashinfer.bench.basis import measured_basis, room_under
    from flashinfer.bench.generate import COMPARISON, Setting, compare, summary
    from flashinfer.choice import parse_predictor
    from flashinfer.config import RunConfig
    from flashinfer.request import device_memory, threads_for
    from flashinfer.store import open_store
    from flashinfer.text import load_tokenizer

    cap = parse_cap(memory, weight_memory, vram)
    for name in predictor or ():
        with usage_errors("--predictor"):
            parse_predictor(name)
    opened = open_store(store)
    tokenizer = load_tokenizer({name: opened.path_of(entry) for name, entry in opened.manifest.text.items()})
    settings = [Setting("cached", "time", name) for name in predictor or ()] or COMPARISON
    run = RunConfig(adapter=adapter)
    with Console(stderr=True, highlight=False).status("") as status:
        with closing(open_backend(device.value, threads_for(opened.manifest, run), run.backend)) as backend:
            device_memory(backend, cap.vram)  # before anything is measured
            basis = measured_basis(
                opened, backend, run, room=room_under(cap), device=device.value, progress=status.update
            )
        status.update("writing the tokens every mode replays")
        samples = compare(
            store, tokenizer.encode(prompt), tokens=tokens, rounds=rounds, run=run, cap=cap, settings=settings,
            basis=basis, device=device.value,
            on_sample=lambda s: status.update(
                f"{s.mode}, {s.predictor}, {s.objective}: {s.tokens_per_second:.2f} tokens/s"
            ),
        )  # fmt: skip
    rows = [summary(s) for s in samples]
    if as_json:
        report = {"schema_version": 1, "command": "bench generate", "tokens": tokens, "rounds": rounds, "rows": rows}
        report["basis"] = basis.to_json()
        print(json.dumps(report | {"samples": [[vars(s) for s in runs] for runs in samples]}))
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(comparison_table(rows, f"{tokens} tokens, {rounds} rounds, medians per token"))
    out.print(promise_table(rows))
    out.print(f"disk curve {basis.disk_source}; memory {basis.rates.dram / 1e9:.3g} GB/s, {basis.rates_source}")
    out.print(kernel_check(rows))


def comparison_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """One row per setting of `bench.generate.summary`; it fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flashinfer.units import format_size

    title = f"{title}; times in ms"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for name in ("mode", "for"):
        table.add_column(name, no_wrap=True)
    for name in ("DRAM", "read", "hits", "I/O", "mgmt", "CPU", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        times = (f"{r[name]:.1f}" for name in ("io_wait_ms", "management_ms", "compute_ms", "tokens_per_second"))
        sizes = (format_size(r[name]) for name in ("weights_in_memory", "bytes_read"))
        table.add_row(_mode(r), r["objective"], *sizes, f"{100 * r['hit_rate']:.0f} %", *times)
    return table


def promise_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What the same rows promised and reached; bytes in percent of those predicted; `bench.generate` defines bound."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "reached, beside what was predicted; bound: what its bytes alone, ms; mgmt: of the token"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for name in ("mode", "for"):
        table.add_column(name, no_wrap=True)
    for name in ("first s", "said", "ms", "said", "bytes", "bound", "x bound", "mgmt"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            _mode(r), r["objective"], f"{r['first_token_s']:.2f}", f"{r['predicted_first_token_s']:.2f}",
            f"{r['token_ms']:.3g}", f"{r['predicted_ms']:.3g}", _share(r["bytes_read"], r["predicted_bytes"]),
            f"{r['bound_ms']:.3g}", f"{r['token_ms'] / r['bound_ms']:.2f}",
            f"{100 * r['management_share']:.0f} %",
        )  # fmt: skip
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _mode(row: dict[str, Any]) -> str:
    return str(row["mode"] if row["predictor"] == "exact" else row["predictor"])


def kernel_check(rows: Sequence[dict[str, Any]]) -> str:
    """One line: whether the kernel counted as many bytes from the device as the ledger."""
    counted = [(r["device_bytes"], r["bytes_read"]) for r in rows if r["device_bytes"] is not None and r["bytes_read"]]
    if not counted:
        return "this system does not count the bytes read from the device: a cache may have answered"
    furthest = max((device / ours for device, ours in counted), key=lambda ratio: abs(ratio - 1))
    return f"the kernel counted {100 * furthest:.1f} % of these bytes as read from the device, in the row furthest off"
