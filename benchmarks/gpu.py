"""A token on a card: every neuron read anew against our slots in both memories, in turn.

    python -m benchmarks.gpu STORE --ids IDS --vram 5GiB --weight-memory 3GiB [--device cuda] [--predictor exact]
                             [--prompt 64] [--naive-tokens 2] [--rounds 3] [--out benchmarks/results/gpu.md]

STORE is packed from a checkpoint of `synthetic.py make opt-6.7b --sparsity 0.97 ...`, and IDS has the tokens to force,
which `synthetic.py ids STORE` prints; those beyond the prompt are decoded.
*naive* reads every weight that is not resident for each token, *ours* keeps slots on the card and in DRAM under one
policy. Each run opens the store anew under the same caps; reads bypass the page cache. Given are medians (range) over
the rounds, of ratios too, which are taken round by round. The disk is measured first: its rate at reads of one record
over that of large ones bounds what selection can gain. Logits of all runs of a kind must be the same bits, and those of
naive nearly the same as ours. VRAM is what torch reserved at most, and what the driver counted at most beyond what was
taken before, by a thread that looks every 20 ms.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.on_card import card_line
from flashinfer.backend import APART, open_backend
from flashinfer.bench.curve import measure_curve
from flashinfer.config import Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import FlashInferError
from flashinfer.memory import Mode, Plan
from flashinfer.store import Manifest, Store, open_store
from flashinfer.units import format_size, parse_size

LOOK = 0.02
"""Seconds between two looks at what the driver counts."""
NEAR = 2e-3
"""How far naive's logits may be from ours, of the largest."""


@dataclass(frozen=True)
class Took:
    """One run, per decoded token: seconds, bytes; shares of a token's time; VRAM in bytes, None without a card."""

    token: float
    flash: float
    copied: float
    management: float
    waiting: float
    hits: float
    first: float
    reserved: int | None
    driver: int | None
    logits: Any


class Watch:
    """What the driver counted at most, beyond what was taken when it began."""

    def __init__(self, device: str) -> None:
        self._card, self.most = device.startswith("cuda"), 0
        self._done = threading.Event()

    def _taken(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Looks while its block runs."""
        if not self._card:
            yield self
            return
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = self._taken()

        def look() -> None:
            while not self._done.wait(LOOK):
                self.most = max(self.most, self._taken() - before)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def reserved(self) -> int | None:
        """What torch reserved at most."""
        if not self._card:
            return None
        import torch

        return int(torch.cuda.max_memory_reserved())


def decode(store: Path, mode: Mode, a: argparse.Namespace, ids: list[int], tokens: int) -> tuple[Took, Plan]:
    """Open, prompt, decode so many tokens of the forced text."""
    run, cap = RunConfig(predictor=a.predictor), Cap(weight_memory=a.weight_memory, vram=a.vram)
    context = a.prompt + a.tokens
    with Watch(a.device).looking() as watch:
        with Model.open(store, cap, run=run, mode=mode, context=context, device=a.device) as model:
            session = model.session()
            model.step(session, ids[: a.prompt])
            for token in ids[a.prompt : a.prompt + tokens]:
                logits = model.step(session, [token])
            account = model.ledger.decode
        took = Took(
            account.seconds / tokens, account.bytes_per_token, account.copied_per_token, account.management_share,
            account.io_wait / account.seconds, account.hit_rate,
            model.ledger.load.seconds + model.ledger.prefill.seconds, watch.reserved(),
            watch.most if a.device.startswith("cuda") else None, logits,
        )  # fmt: skip
    return took, model.plan


def compare(store: Path, a: argparse.Namespace, ids: list[int]) -> tuple[dict[str, list[Took]], Plan]:
    """Rounds of both. Raises SystemExit where logits are not what they must be."""
    found: dict[str, list[Took]] = {"naive": [], "ours": []}
    plan: Plan | None = None
    for i in range(a.rounds):
        for name in ("naive", "ours") if i % 2 else ("ours", "naive"):
            ours = name == "ours"
            took, made = decode(store, "cached" if ours else "naive", a, ids, a.tokens if ours else a.naive_tokens)
            found[name].append(took)
            plan = made if ours else plan
            print(f"round {i + 1}, {name}: {1e3 * took.token:.1f} ms a token", file=sys.stderr)
    for name, runs in found.items():
        if not all(np.array_equal(runs[0].logits, run.logits) for run in runs):
            raise SystemExit(f"error: runs of {name} do not repeat their bits")
    after, _ = decode(store, "cached", a, ids, a.naive_tokens)
    off = float(np.abs(after.logits - found["naive"][0].logits).max() / np.abs(after.logits).max())
    if not off <= NEAR:
        raise SystemExit(f"error: logits of naive and ours differ by {off:.2g} of the largest")
    assert plan is not None
    return found, plan


def held(plan: Plan, m: Manifest) -> float:
    """The share of the model's weights that the plan keeps, in either memory."""
    there = 0 if plan.device is None else plan.device.weight_resident + plan.device.weight_slots
    return (plan.weight_resident + plan.weight_slots + there) / m.weight_bytes()


def disk_line(store: Store) -> str:
    """How fast the disk reads records against all in a row."""
    known = measure_curve(store.path_of(store.manifest.neurons))
    if known is None:
        return "- the disk could not be measured"
    record, depth = store.manifest.layers[0].record_bytes, IoConfig().in_flight
    rate = 1000 * record / known.curve.seconds(1000, 1000 * record, depth)
    return (
        f"- disk: reads of one record ({format_size(record)}) {rate / 1e9:.2f} GB/s, large ones "
        f"{known.curve.bytes_per_s / 1e9:.2f} GB/s, ratio {rate / known.curve.bytes_per_s:.2f}"
    )


def about(a: argparse.Namespace, store: Store, plan: Plan) -> list[str]:
    """The circumstances, one fact for each line."""
    import torch

    device = "the CPU, as a device"
    if a.device.startswith("cuda"):
        device = card_line(a.device)
    m = store.manifest
    with closing(open_backend(a.device, 1)) as backend:
        name = backend.name
    return [
        f"- command: `python -m benchmarks.gpu {' '.join(sys.argv[1:])}`",
        f"- {datetime.now(UTC):%Y-%m-%d}, {device}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"backend {name}, {platform.system()} {platform.release()}, load {os.getloadavg()[0]:.2f}",
        f"- {m.facts.num_layers} layers, {format_size(m.weight_bytes())} of weights, {held(plan, m):.0%} of them kept; "
        f"VRAM {format_size(a.vram)}, planned {format_size(plan.device.total if plan.device else 0)}; "
        f"{a.prompt} + {a.tokens} forced tokens, naive {a.naive_tokens}; {a.rounds} rounds",
        disk_line(store),
    ]


def report(found: dict[str, list[Took]], lines: list[str]) -> str:
    """The table, and the ratios."""
    names = "ms a token", "flash, MB", "copied, MB", "management", "waiting", "hits", "prompt, s", "VRAM", "driver's"
    head = f"| | {' | '.join(names)} |"
    rows = ["# A token on a card", "", *lines, "", head, "| --- |" + " --- |" * 9]
    for name, runs in found.items():
        cells = [
            _cell(runs, lambda t: 1e3 * t.token), _cell(runs, lambda t: t.flash / 1e6),
            _cell(runs, lambda t: t.copied / 1e6), _cell(runs, lambda t: 100 * t.management, "%"),
            _cell(runs, lambda t: 100 * t.waiting, "%"), _cell(runs, lambda t: 100 * t.hits, "%"),
            _cell(runs, lambda t: t.first),
        ]  # fmt: skip
        most = [[t.reserved for t in runs if t.reserved], [t.driver for t in runs if t.driver]]
        rows.append(f"| {name} | {' | '.join(cells + [format_size(max(some)) if some else '-' for some in most])} |")
    pairs = list(zip(found["naive"], found["ours"], strict=True))
    speed = [naive.token / ours.token for naive, ours in pairs]
    flash = [naive.flash / ours.flash if ours.flash else float("inf") for naive, ours in pairs]
    rows += ["", f"Times naive: {_range(speed)}; flash bytes fewer by {_range(flash)}."]
    rows += ["Logits repeat their bits, and naive's are nearly the same."]
    return "\n".join(rows) + "\n"


def _cell(runs: list[Took], of: Callable[[Took], float], unit: str = "") -> str:
    return _range([of(run) for run in runs]) + (f" {unit}" if unit else "")


def _range(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("store", type=Path)
    p.add_argument("--ids", type=Path, required=True, help="a file of token ids")
    p.add_argument("--device", default="cuda", help=f"cuda, cuda:N, or {APART} for the CPU as one")
    p.add_argument("--vram", type=parse_size, required=True)
    p.add_argument("--weight-memory", type=parse_size, required=True)
    p.add_argument("--predictor", default="exact")
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--naive-tokens", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, help="write the report here, too")
    a = p.parse_args(argv)
    try:
        store = open_store(a.store)
        ids = [int(i) for i in a.ids.read_text().split()]
        a.tokens = len(ids) - a.prompt
        if a.tokens < max(1, a.naive_tokens):
            raise SystemExit(f"error: {a.ids} has {len(ids)} tokens, too few for a prompt of {a.prompt}; give more")
        found, plan = compare(a.store, a, ids)
        text = report(found, about(a, store, plan))
    except FlashInferError as e:
        raise SystemExit(f"error: {e}") from e
    print(text, end="")
    if a.out is not None:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
