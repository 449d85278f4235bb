"""The fused sparse feed-forward on a card against a copy of as many bytes, and against torch.

    python benchmarks/gpu_ffn.py [--codecs f16 int8 int4g64 nf4] [--active 0.05] [--slots 0.25] [--rounds 31]
                                 [--out benchmarks/results/gpu_ffn.md]

A layer is 16384 gated neurons of width 4096, of which `--slots` have a slot in the card's memory; there are 32 layers,
each with slots of its own, so that nothing is in the L2 cache when its turn comes. One token, whose active neurons
(`--active` of a layer, drawn beforehand, in no order) all have slots.

*fused*: `fused_ffn`, as the runtime calls it. *torch*, for f16 and bf16 only: `index_select` of the same bundles, and
`matmul` in their type with the up rows and the down rows. *copy*: as many bytes from one place of the card's memory to
another, through 32 of each. All are CUDA graphs of one pass through the 32 layers, timed by device events, in turn, in
an order that changes with the round. Given are medians (range) over the rounds, bytes being those of the active
bundles, once; of the shares, which are taken round by round, likewise.

Before anything is timed, results of fused and torch are compared with float64, and fused with itself, bit for bit.
Without a card it says so, and nothing is measured. `--check` compares small layers, on any device, and ends.
"""

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
from flashinfer.backend.base import Bundle, Part
from flashinfer.config import TILE_NEURONS
from flashinfer.quant import CODECS, codec_named

NEURONS, WIDTH, LAYERS = 16384, 4096, 32
HALVES = {"f16": "float16", "bf16": "bfloat16"}
"""Codecs that torch multiplies as they are."""
DISTINCT = 512
"""Bundles that are encoded; slots repeat them."""


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


class Working:
    """Slots of some layers on a device, a token for them, and who is active.

    Attributes:
        bundle: how a slot lies. offsets: int64 `[layers, tiles, TILE_NEURONS]`, 0 where a tile is filled up.
        fired: float32 `[tiles, 1, TILE_NEURONS]`. active: so many neurons of a layer.
    """

    def __init__(self, codec: str, layers: int, slots: int, width: int, active: int, device: str) -> None:
        import torch

        row = codec_named(codec).row_bytes(width)
        self.codec, self.label, self.active, self.layers, self.size = codec, codec, active, layers, 2 * row * active
        self.bundle = Bundle(2 * row, Part(row, width, codec), Part(0, width, codec))
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((2 * min(slots, DISTINCT), width)).astype(np.float32) / np.float32(width**0.5)
        some = torch.from_numpy(codec_named(codec).encode(rows).reshape(-1, 2 * row)).to(device)
        self.memory = some.repeat(-(-layers * slots // len(some)), 1)[: layers * slots].contiguous().view(-1)
        tiles = -(-active // TILE_NEURONS)
        places, fired = np.zeros((layers, tiles * TILE_NEURONS), np.int64), np.zeros(tiles * TILE_NEURONS, np.float32)
        for layer in range(layers):
            places[layer, :active] = (layer * slots + rng.permutation(slots)[:active]) * 2 * row
        fired[:active] = np.abs(rng.standard_normal(active)) + 0.1
        self.offsets = torch.from_numpy(places).view(layers, tiles, TILE_NEURONS).to(device)
        self.fired = torch.from_numpy(fired).view(tiles, 1, TILE_NEURONS).to(device)
        self.x = torch.from_numpy(rng.standard_normal((1, width)).astype(np.float32)).to(device)
        self.acc = torch.zeros(1, width, device=device)
        self.places = self.offsets.view(layers, -1)[:, :active] // self.bundle.bytes

    def fused(self, layer: int) -> None:
        """Add a layer to `acc`."""
        from flashinfer.backend.triton_ffn import fused_ffn

        fused_ffn(self.acc, self.x, self.fired, self.memory, self.offsets[layer], self.bundle)

    def torch(self, layer: int) -> None:
        """The same by a gather and two products, in the type of the weights."""
        import torch

        kind = getattr(torch, HALVES[self.codec])
        rows = self.memory.view(-1, self.bundle.bytes).index_select(0, self.places[layer]).view(kind)
        up, down = rows.view(self.active, 2, -1).unbind(1)
        h = (up @ self.x[0].to(kind)) * self.fired.view(-1)[: self.active].to(kind)
        self.acc += (h @ down).float()

    def expected(self, layer: int) -> np.ndarray:
        """What a layer adds, in float64."""
        raw = self.memory.view(-1, self.bundle.bytes)[self.places[layer]].cpu().numpy()
        codec, half, width = codec_named(self.codec), self.bundle.bytes // 2, self.x.shape[1]
        up, down = (codec.decode(np.ascontiguousarray(part), width) for part in (raw[:, :half], raw[:, half:]))
        h = (up.astype(np.float64) @ self.x[0].cpu().numpy()) * self.fired.view(-1)[: self.active].cpu().numpy()
        return np.asarray(h @ down)

    def found(self, who: Callable[[int], None], layer: int) -> np.ndarray:
        """What it adds for a layer."""
        self.acc.zero_()
        who(layer)
        return np.asarray(self.acc[0].cpu().numpy())


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


def describe(command: str) -> list[str]:
    """The circumstances, one fact for each line."""
    import torch
    import triton

    card = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    return [
        f"- command: `{' '.join([command, *sys.argv[1:]])}`",
        f"- {datetime.now(UTC):%Y-%m-%d}, {card.name}, {card.total_memory / 2**30:.0f} GiB, L2 "
        f"{card.L2_cache_size >> 20} MiB, driver {driver or 'unknown'}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.2f}",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}",
    ]


def needs_triton() -> None:
    """Raises SystemExit where it is not there."""
    if not has_triton():
        raise SystemExit("error: Triton is not installed; pip install 'flashinfer-offload[gpu]'")


def needs_card() -> None:
    """Raises SystemExit where there is none."""
    if device_to_check() == "cpu":
        raise SystemExit("error: there is no CUDA device here, so there is nothing to measure; --check needs none")


def device_to_check() -> str:
    """Where results are compared: on the card if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--codecs", nargs="+", default=["f16", "int8", "int4g64", "nf4"], choices=list(CODECS))
    p.add_argument("--active", type=float, default=0.05, help="share of a layer's neurons (default: 0.05)")
    p.add_argument("--slots", type=float, default=0.25, help="share of a layer's neurons in slots (default: 0.25)")
    p.add_argument("--rounds", type=int, default=31)
    p.add_argument(
        "--check", action="store_true", help="compare small layers and end, on the CPU where there is no card"
    )
    p.add_argument("--out", type=Path, help="write the report here, too")
    a = p.parse_args(argv)
    needs_triton()
    if a.check:
        device = device_to_check()
        for codec in a.codecs:
            check(Working(codec, 2, 90, 96, 70, device))
        print(f"{', '.join(a.codecs)}: results are right and repeat, on {device}")
        return 0
    needs_card()
    rows = []
    for codec in a.codecs:
        working = Working(codec, LAYERS, round(NEURONS * a.slots), WIDTH, round(NEURONS * a.active), "cuda")
        check(working)
        rows.append(measure(working, a.rounds))
    about = (
        f"- {LAYERS} layers of {NEURONS} x {WIDTH}, {a.active:.0%} of the neurons active, {a.slots:.0%} in slots, "
        f"{a.rounds} rounds"
    )
    text = markdown("The sparse feed-forward on a card", rows, [*describe("python benchmarks/gpu_ffn.py"), about])
    print(text, end="")
    if a.out is not None:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
