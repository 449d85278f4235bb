"""What benchmarks of kernels on a card share: contenders compared with float64, then timed in turn as CUDA graphs."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from flashinfer.backend import has_triton
from flashinfer.quant import CODECS

HALVES = {"f16": "float16", "bf16": "bfloat16"}
"""Codecs that torch multiplies as they are."""
DISTINCT = 512
"""Rows or bundles that are encoded; others repeat them."""


@dataclass
class Row:
    """One line of the table: seconds of each round, for a pass through all layers, of `size` bytes each."""

    label: str
    layers: int
    size: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def rates(self, who: str) -> list[float]:
        """Bytes per second."""
        return [self.layers * self.size / s for s in self.seconds[who]]

    def shares(self, of: str) -> list[float]:
        """The speed of fused over another's, round by round."""
        return [b / a for a, b in zip(self.seconds["fused"], self.seconds[of], strict=True)]


class Contender(Protocol):
    """What is measured: `layers` of so many bytes (`size`) each, computed with by the kernels and, where it multiplies
    the codec as it is, by torch."""

    codec: str
    label: str
    layers: int
    size: int

    def fused(self, layer: int) -> None:
        """A layer, by the kernels."""

    def torch(self, layer: int) -> None:
        """The same, by torch."""

    def expected(self, layer: int) -> np.ndarray:
        """The same, in float64."""
        ...

    def found(self, who: Callable[[int], None], layer: int) -> np.ndarray:
        """What one of them gives."""
        ...


def check(working: Contender) -> None:
    """Raises SystemExit where results are not what they must be."""
    for layer in (0, working.layers - 1):
        expected = working.expected(layer)
        contenders = {"fused": (working.fused, 2e-5)} | (
            {"torch": (working.torch, 0.03)} if working.codec in HALVES else {}
        )
        for name, (who, tolerance) in contenders.items():
            found = working.found(who, layer)
            off = np.abs(found - expected).max() / np.abs(expected).max()
            if not off <= tolerance:
                raise SystemExit(f"error: {name} of {working.label} is off by {off:.2g} of the largest value")
        if not np.array_equal(working.found(working.fused, layer), working.found(working.fused, layer)):
            raise SystemExit(f"error: fused of {working.label} does not repeat its bits")


def graph_of(work: Callable[[int], None], layers: int) -> Callable[[], None]:
    """A CUDA graph of one pass through all layers, warmed up."""
    import torch

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before they are captured
        for layer in range(layers):
            work(layer)
    stream.synchronize()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            work(layer)
    graph.replay()
    return graph.replay


def timed(replay: Callable[[], None]) -> float:
    """Seconds of a pass, by device events."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(working: Contender, rounds: int) -> Row:
    """All contenders in every round, in turn."""
    import torch

    row = Row(working.label, working.layers, working.size)
    source, target = (torch.zeros(working.layers, working.size, dtype=torch.uint8, device="cuda") for _ in range(2))
    runs = {"fused": working.fused, "copy": lambda layer: target[layer].copy_(source[layer])}
    if working.codec in HALVES:
        runs["torch"] = working.torch
    replays = {name: graph_of(work, working.layers) for name, work in runs.items()}
    order = list(replays)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            row.seconds.setdefault(name, []).append(timed(replays[name]))
    return row


def markdown(title: str, rows: list[Row], about: list[str]) -> str:
    """The table, and what it was measured on."""
    head = "| codec | bytes a layer | fused GB/s | copy GB/s | % of the copy | torch GB/s | times torch |"
    lines = [f"# {title}", "", *about, "", head, "| --- |" + " --- |" * 6]
    for row in rows:
        cells = [row.label, f"{row.size:,}"]
        cells += [_cell(row.rates("fused"), 1e9), _cell(row.rates("copy"), 1e9), _cell(row.shares("copy"), 0.01)]
        there = "torch" in row.seconds
        cells += [_cell(row.rates("torch"), 1e9), _cell(row.shares("torch"), 1, 2)] if there else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], unit: float, digits: int = 0) -> str:
    v = sorted(value / unit for value in values)
    return f"{median(v):.{digits}f} ({v[0]:.{digits}f}-{v[-1]:.{digits}f})"


def card_line(device: str) -> str:
    """The card, its memory, and its driver."""
    import torch

    card = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return (
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, L2 {card.L2_cache_size >> 20} MiB, "
        f"driver {driver or 'unknown'}"
    )


def describe(command: str) -> list[str]:
    """The circumstances, one fact for each line."""
    import torch
    import triton

    return [
        f"- command: `{' '.join([command, *sys.argv[1:]])}`",
        f"- {datetime.now(UTC):%Y-%m-%d}, {card_line('cuda:0')}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.2f}",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}",
    ]


def parser_of(doc: str | None, what: str) -> argparse.ArgumentParser:
    """The options of all; `what` is compared with `--check`."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    p.add_argument("--codecs", nargs="+", default=["f16", "int8", "int4g64", "nf4"], choices=list(CODECS))
    p.add_argument("--rounds", type=int, default=31)
    p.add_argument(
        "--check", action="store_true", help=f"compare small {what} and end, on the CPU where there is no card"
    )
    p.add_argument("--out", type=Path, help="write the report here, too")
    return p


def run(
    a: argparse.Namespace, script: str, title: str, about: str, small: Callable[[str, str], Contender],
    measured: Callable[[str], list[Row]],
) -> int:  # fmt: skip
    """Compare, or measure and print. small: a contender of a codec on a device. measured: the rows of a codec."""
    if not has_triton():
        raise SystemExit("error: Triton is not installed; pip install 'flashinfer-offload[gpu]'")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.check:
        for codec in a.codecs:
            check(small(codec, device))
        print(f"{', '.join(a.codecs)}: results are right and repeat, on {device}")
        return 0
    if device == "cpu":
        raise SystemExit("error: there is no CUDA device here, so there is nothing to measure; --check needs none")
    rows = [row for codec in a.codecs for row in measured(codec)]
    facts = [*describe(f"python -m benchmarks.{script}"), f"- {about}; {a.rounds} rounds"]
    text = markdown(title, rows, facts)
    print(text, end="")
    if a.out is not None:
        a.out.write_text(text)
    return 0
