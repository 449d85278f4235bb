"""The circumstances of a comparison in words: the machine, the model, and what the tables rest on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from flashinfer import machine
from flashinfer.bench.compare.contest import Run, may_drop_everything
from flashinfer.bench.place import place_of, read_ahead_of
from flashinfer.config import Rates
from flashinfer.store import Manifest
from flashinfer.units import format_size

GB = 1e9
FIGURES = (
    "Seconds are those of a decoded token's step, median and range over all rounds; the first token's are from the "
    "start of the process, imports among them. Bytes read are those the kernel fetched for the process; asked are "
    "those of our reader. Peak memory is anonymous, shared and kernel memory, without the page cache, where mapped "
    "files lie. Roofline: the share of a token's time that its bytes alone would take, read from flash at the rate "
    "probed before and during the run and then from memory at the rate of a plain scan; above 100 % the two overlap."
)


def facts(store: Path, command: str, *, grouped: bool) -> list[str]:
    """The machine, and how to repeat this; names no host and no folder."""
    place = place_of(store)
    disk, ahead = (*place.device.split(", ")[1:2], f"{place.kind} disk")[0], read_ahead_of(store)
    if ahead is not None:
        disk += f" whose mapped files are read up to {format_size(ahead)} ahead"
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    cold = "the whole page cache was dropped" if may_drop_everything() else "the files' pages were dropped"
    capped = (
        "each run in a fresh memory cgroup of the cap, swap off"
        if grouped
        else "WITHOUT memory cgroups: ours kept their caps by themselves, the other programs ran uncapped"
    )
    return [
        f"{machine.compute_threads()} cores ({machine.processor_name()}), "
        f"{psutil.virtual_memory().total / GB:.0f} GB of memory, {place.filesystem} on a {disk}, {system}",
        f"{datetime.now(UTC):%Y-%m-%d}; load average before: {os.getloadavg()[0]:.1f}; {capped}; "
        f"before each run {cold}",
        f"`{command}`",
    ]


def model_notes(m: Manifest, disk: dict[str, Any], rates: Mapping[str, Rates]) -> list[str]:
    """What the tables of this model rest on."""
    f, curve = m.facts, disk["known"]
    measured = (
        f"{name}: memory {r.dram / GB:.1f}, matrices {r.linear / GB:.1f}, neurons {r.bundle / GB:.1f} GB/s"
        for name, r in rates.items()
    )
    experts = "" if f.experts is None else f", {f.experts.count} experts of {f.experts.size}"
    return [
        f"{m.weight_bytes() / GB:.2f} GB of weights: hidden {f.hidden_size}, FFN {f.intermediate_size}{experts} "
        f"({f.activation}), {f.num_layers} layers, {f.num_heads} heads, vocabulary {f.vocab_size}.",
        *([f"Rates, {'; '.join(measured)}."] if rates else []),
        f"Curve known before: {curve['bytes_per_s'] / GB:.2f} GB/s, {curve['per_read_s'] * 1e6:.0f} us a read "
        f"({disk['known_source']}).",
    ]


def run_notes(runs: Sequence[Run], tokens: int) -> list[str]:
    """What the figures are, versions, readers, and what failed runs said last."""
    ends = {r.contender: r.end for r in runs if r.status == "ok"}
    versions = dict.fromkeys(f"{'ours' if 'asked' in end else name} {end['version']}" for name, end in ends.items())
    readers: dict[str, list[str]] = {}
    for name, end in ends.items():
        if "reader" in end:
            readers.setdefault(end["reader"], []).append(name)
    return [
        FIGURES,
        f"Perplexity is that of the {tokens} forced tokens after the prompt, the same for all: enough to see that "
        "something is broken, too few to rank what is not.",
        *([f"Versions: {', '.join(versions)}."] if versions else []),
        *(f"{', '.join(names)}: {reader}." for reader, names in readers.items()),
        *dict.fromkeys(f"{r.contender} {r.status}: {r.error.splitlines()[-1]}" for r in runs if r.error),
    ]  # fmt: skip
