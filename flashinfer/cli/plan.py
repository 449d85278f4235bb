"""`flashinfer plan`: where each byte of a cap goes, and how fast that will be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashinfer.cli.options import (
    DEFAULT_BACKEND,
    DEFAULT_KV,
    DEFAULT_PPL,
    AdapterOption,
    BackendOption,
    ExpertsOption,
    KvOption,
    LogLevelOption,
    MaxPplOption,
    MemoryOption,
    PredictorOption,
    VramOption,
    WeightMemoryOption,
    parse_cap,
    parse_predictor_options,
    set_log_level,
)
from flashinfer.cli.run_options import ADAPTED, DEFAULT_READER, Device, DeviceOption, ReaderOption
from flashinfer.config import IoConfig, Rates, RunConfig

if TYPE_CHECKING:
    from flashinfer.bench.promise import Promise, Row
    from flashinfer.memory import DevicePlan, Plan
    from flashinfer.speed import Prediction

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""
BAR = 40


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Weight store, as written by `flashinfer pack`.")],
    memory: MemoryOption = None,
    weight_memory: WeightMemoryOption = None,
    vram: VramOption = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and continuation together. (default: up to 4096)")
    ] = None,
    device: DeviceOption = Device.CPU,
    reader: ReaderOption = DEFAULT_READER,
    backend: BackendOption = DEFAULT_BACKEND,
    predictor: PredictorOption = RunConfig.predictor,
    max_ppl_increase: MaxPplOption = DEFAULT_PPL,
    adapter: AdapterOption = None,
    experts_per_token: ExpertsOption = None,
    kv_type: KvOption = DEFAULT_KV,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads; 0 is all cores.")] = RunConfig.threads,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure disk and machine again.")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="Seconds per chunk size and depth when the disk is measured.")
    ] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Say where each byte of a memory cap goes, and predict time to first token and tokens per second.

    The disk and the machine are measured once and remembered in the user's cache directory.
    """
    set_log_level(log_level)
    cap = parse_cap(memory, weight_memory, vram)
    predictor, worse = parse_predictor_options(predictor, max_ppl_increase, experts_per_token)
    run = RunConfig(
        backend=backend.value, kv_type=kv_type.value, threads=threads, predictor=predictor, max_ppl_increase=worse,
        adapter=adapter, io=IoConfig(reader=reader.value),
    )  # fmt: skip
    from rich.console import Console

    from flashinfer.bench.promise import promise

    with Console(stderr=True, highlight=False).status("") as status:
        found = promise(
            store, cap, context=context, run=run, device=device.value, remeasure=remeasure, seconds=seconds,
            progress=status.update,
        )  # fmt: skip
    if as_json:
        print(json.dumps(_as_json(found)))
        return
    for line in [*plan_lines(found), "", *speed_lines(found), "", *other_lines(found)]:
        print(line)


def _as_json(found: Promise) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "schema_version": SCHEMA_VERSION,
        **_row_json(found.asked),
        "other_caps": [_row_json(row) for row in found.others],
        "basis": found.basis.to_json(),
        "place": asdict(found.place),
        "reader": found.direct,
        "predictor": {"kind": found.choice.kind, "approximation": found.choice.note or None},
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "cap": row.cap,
        "floor": row.floor,
        "plan": row.plan and row.plan.to_json(),
        "prediction": row.prediction and row.prediction.to_json(),
    }


def plan_lines(found: Promise) -> list[str]:
    """Every part of the plan with its share of the cap, as a table and a bar."""
    from flashinfer.units import format_size

    plan = found.asked.plan
    assert plan is not None
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    lines = [f"{plan.cap_kind} cap {format_size(plan.cap)}, context {plan.context}"]
    for name, size in _parts(plan):
        lines.append(_part_line(name, size, plan.cap, block))
    if plan.device is not None:
        lines.append(f"device memory {format_size(plan.device.cap)}")
        lines += [
            _part_line(name, size, plan.device.cap, block) for name, size in _device_parts(plan.device, plan.kv_type)
        ]
    return lines


def _part_line(name: str, size: int, cap: int, block: str) -> str:
    from flashinfer.units import format_size

    return f"  {name:<34} {format_size(size):>9}  {size / cap:6.1%}  {block * round(BAR * size / cap)}".rstrip()


def _device_parts(device: DevicePlan, kv_type: str) -> list[tuple[str, int]]:
    parts = [
        (f"resident matrices ({len(device.resident)})", device.weight_resident),
        (f"neuron slots ({sum(device.slots)} records)", device.weight_slots),
        ("norms and biases", device.weight_vectors),
        *([("adapter", device.weight_adapter)] if device.weight_adapter else []),
        ("weights on their way", device.weight_staging),
        ("tiles being computed", device.weight_scratch),
        (f"keys and values ({kv_type})", device.kv_cache),
        ("activations", device.activations),
        *([("cache bookkeeping", device.bookkeeping)] if device.bookkeeping else []),
        ("driver and libraries (assumed)", device.overhead),
    ]
    return [*parts, ("free", device.cap - device.total)]


def _parts(plan: Plan) -> list[tuple[str, int]]:
    matrices = f"resident matrices ({len(plan.resident)})"
    parts = [
        (matrices, plan.weight_resident),
        (f"neuron slots ({sum(plan.slots)} records)", plan.weight_slots),
        ("norms and biases", plan.weight_vectors),
        *([("adapter", plan.weight_adapter)] if plan.weight_adapter else []),
        ("read buffers", plan.weight_staging),
        ("tiles being computed", plan.weight_scratch),
    ]
    if plan.cap_kind == "memory":
        parts += [
            ("program and libraries", plan.baseline),
            (f"keys and values ({plan.kv_type})", plan.kv_cache),
            ("activations", plan.activations),
            ("cache bookkeeping", plan.bookkeeping),
        ]
    return [*parts, ("free", plan.cap - plan.total)]


def speed_lines(found: Promise) -> list[str]:
    """What a token takes, what bounds it, and what the figures rest on."""
    from flashinfer.units import format_size

    p, basis = found.asked.prediction, found.basis
    assert p is not None
    disk, rates = basis.disk, basis.rates
    return [
        "per token",
        f"  {'from flash':<34} {format_size(p.flash_bytes):>9} in {p.flash_reads:.0f} reads, "
        f"{_time(p.disk_seconds)} alone",
        f"  {'from DRAM':<34} {format_size(p.dram_bytes):>9}, {_time(p.dram_seconds)} alone",
        *_device_lines(p, rates),
        f"  {'arithmetic and bookkeeping':<34} {_time(p.compute_seconds):>9} alone",
        f"  predicted: {_time(p.token_seconds)}, {_rate(p)}, bounded by {p.bound}",
        f"  predicted: first token of a prompt of {p.prompt_tokens} after {_time(p.first_token_seconds)}, "
        f"and {_time(p.load_seconds)} to load",
        f"  ceiling were the feed-forward layers free: {1 / p.ffn_free_seconds:.3g} tokens/s",
        "resting on",
        f"  disk: {1e6 * disk.per_read_s:.1f} us a read, {disk.bytes_per_s / 1e9:.2f} GB/s, latency "
        f"{1e6 * disk.latency_s:.0f} us ({basis.disk_source}; {found.place.device}, {found.place.filesystem})",
        f"  machine: DRAM {rates.dram / 1e9:.1f} GB/s, matrices {rates.linear / 1e9:.1f} GB/s, neurons "
        f"{rates.bundle / 1e9:.1f} GB/s ({basis.rates_source})",
        *(
            [f"  device: copies to it {rates.pcie / 1e9:.1f} GB/s, its memory {rates.vram / 1e9:.1f} GB/s"]
            if p.vram_bytes
            else []
        ),
        f"  neurons: {_firing(p)}",
        *([f"  {found.choice.note}"] if found.choice.note else []),
        *([f"  {ADAPTED}"] if found.asked.plan is not None and found.asked.plan.weight_adapter else []),
    ]


def _device_lines(p: Prediction, rates: Rates) -> list[str]:
    """What goes to a device, and what it reads of its own memory; nothing without one."""
    from flashinfer.units import format_size

    if not p.vram_bytes:
        return []
    return [
        f"  {'copied to the device':<34} {format_size(p.pcie_bytes):>9}, {_time(p.pcie_bytes / rates.pcie)} alone",
        f"  {'from its memory':<34} {format_size(p.vram_bytes):>9}, {_time(p.vram_bytes / rates.vram)} alone",
    ]


def _firing(p: Prediction) -> str:
    if p.firing.density >= 1.0:
        return "every one is needed at every token"
    what = f"{p.firing.density:.0%} fire per token"
    if p.firing.hit_rate is not None:
        return f"{p.firing.source}: {what}, {p.firing.hit_rate:.0%} of them found in slots"
    if p.firing.source == "measured":
        return f"{what}, measured when the store was calibrated"
    return f"{p.firing.source}, not measured: {what}, of which (1 - slots/records)^{p.firing.reuse:g} must be read"


def other_lines(found: Promise) -> list[str]:
    """The same for other caps, the asked one among them."""
    from flashinfer.units import format_size

    lines = [f"{'cap':>12}  {'flash/token':>12}  {'tokens/s':>9}  {'first token':>11}  bounded by"]
    for row in sorted((*found.others, found.asked), key=lambda row: row.cap):
        mark = " <- asked" if row is found.asked else ""
        if row.prediction is None:
            lines.append(f"{format_size(row.cap):>12}  below the floor of {format_size(row.floor or 0)}{mark}")
            continue
        p = row.prediction
        lines.append(
            f"{format_size(row.cap):>12}  {format_size(p.flash_bytes):>12}  {p.tokens_per_second:>9.3g}  "
            f"{_time(p.first_token_seconds):>11}  {p.bound}{mark}"
        )
    return lines


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rate(p: Prediction) -> str:
    return f"{p.tokens_per_second:.3g} tokens/s"
