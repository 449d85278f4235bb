"""A model that does not fit, under memory caps: ours, llama.cpp on a mapped file, and a plain streaming loop.

    python benchmarks/caps.py [STORE] --checkpoint DIR [--llama-python PYTHON --gguf FILE]
        [--relu STORE [--relu-checkpoint DIR]] [--caps 1.0GB 1.7GB 3.4GB 6.0GB] [--rounds 3] [-n 8]

STORE was packed from DIR (f16, llama-shaped). PYTHON is one with llama-cpp-python and gguf; FILE is made from DIR
where it is missing. A contender that has no Python or no files is left out, and the report says so.

Method. Each run is a fresh process in a fresh memory cgroup of exactly the cap, swap off, all files cold (sync,
drop_caches where permitted, POSIX_FADV_DONTNEED). In every round, for every cap, the contenders run one after the
other. All process the same prompt and then the same forced tokens, with as many threads as cores. Seconds are those
of one token's step; bytes are what the kernel says it fetched for the process (/proc/self/io: direct reads and page
faults alike). Peak memory is anonymous, shared and kernel memory of the cgroup, sampled every 20 ms; page cache,
which is where a mapped file lives, is not in it. Before each run, and three times while ours decodes (between tokens,
untimed), the raw disk is read for a second: directly, in order, 1 MiB at a time, eight in flight. Ours is predicted
from its plan, rates of this machine measured once outside the cgroup, and the disk at that rate; and from the curve
known before. Logits after the prompt and after each token are compared with ours, in all runs.

With --relu the same for a ReLU store, besides STORE or alone. llama.cpp has no ReLU llama, so it runs the SiLU model
there: the same bytes. So does the plain loop, unless --relu-checkpoint is given.

Results go to `results/caps.md` and `results/caps.json` beside this file (--out, --name), after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from flashinfer import machine
from flashinfer.backend import open_backend
from flashinfer.bench.curve import measure_curve
from flashinfer.bench.io import Combination, measure
from flashinfer.bench.place import place_of
from flashinfer.bench.promise import known_basis
from flashinfer.bench.rates import main_codec, measure_rates
from flashinfer.config import DiskCurve, Rates, RunConfig
from flashinfer.engine import threads_for
from flashinfer.store import Manifest, Store, open_store
from flashinfer.units import MIB, parse_size

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.cgroup import NoCgroupError, fresh_group
from peers.contest import Contender, Disk, Run, compete, may_drop_everything
from peers.tables import GB, OURS, markdown, summarize
from planted.text import ids_of

HERE = Path(__file__).resolve().parent
LLAMA, NAIVE = "llama.cpp (mmap)", "naive"
WANTED = {LLAMA: "--llama-python, or no --gguf", NAIVE: "--checkpoint"}
IN_FLIGHT = 8
CURVE_SECONDS = 0.3
"""For each of ten combinations of chunk and depth."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--checkpoint", type=Path, help="what the store was packed from")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the checkpoint for llama.cpp; made where it is missing")
    parser.add_argument("--relu", type=Path, metavar="STORE")
    parser.add_argument("--relu-checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--caps", nargs="+", type=parse_size, default=[parse_size(f"{c}GB") for c in (1, 1.7, 3.4, 6)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-n", "--tokens", type=int, default=8, help="forced tokens (default: 8)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt (default: 8)")
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--probe", type=float, default=1.0, metavar="SECONDS", help="each look at the raw disk")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default="caps", help="of the files of results")
    args = parser.parse_args(argv)
    if args.store is None and args.relu is None:
        parser.error("give a STORE, or --relu STORE")
    return args


def contenders(args: argparse.Namespace, store: Path, checkpoint: Path | None, *, same: bool) -> list[Contender]:
    """Who can run; `same`: llama.cpp computes what the store computes."""
    found = [Contender(OURS, "run_flashinfer", store.resolve())]
    if args.llama_python and args.gguf and args.gguf.exists():
        found.append(Contender(LLAMA, "run_llama", args.gguf.resolve(), args.llama_python, comparable=same))
    weights = checkpoint or args.checkpoint
    if weights:
        found.append(Contender(NAIVE, "run_naive", weights.resolve(), comparable=same or checkpoint is not None))
    return found


def make_gguf(args: argparse.Namespace) -> None:
    """Convert the checkpoint, where llama.cpp is wanted and has no file yet."""
    if args.llama_python and args.gguf and args.checkpoint and not args.gguf.exists():
        say(f"converting to {args.gguf.name}")
        command = [args.llama_python, str(HERE / "peers" / "to_gguf.py"), str(args.checkpoint), str(args.gguf)]
        subprocess.run(command, check=True)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def disk_of(store: Store, probe_seconds: float) -> tuple[Disk, dict[str, Any]]:
    """The disk under a store: a probe, and what predictions are made from. Measures the curve's shape once."""
    neurons = store.path_of(store.manifest.neurons)
    chunk = min(MIB, 1 << (neurons.stat().st_size // IN_FLIGHT).bit_length() - 1)
    basis, measured = known_basis(store, RunConfig()), measure_curve(neurons, seconds=CURVE_SECONDS)
    shape = measured.curve if measured else basis.disk
    known = basis.disk if basis.disk_measured else shape
    source = basis.disk_source if basis.disk_measured else "measured at the start of this run"

    def probe() -> float:
        result = measure(neurons, [Combination("sequential", chunk, IN_FLIGHT)], seconds=probe_seconds, rounds=1)
        return result.results[0].mb_per_s * 1e6

    def curves(rate: float) -> dict[str, dict[str, float]]:
        return {"probed": asdict(at_rate(shape, rate, chunk)), "cached": asdict(known)}

    return Disk(probe, curves), {"shape": asdict(shape), "known": asdict(known), "known_source": source}


def at_rate(shape: DiskCurve, rate: float, chunk: int) -> DiskCurve:
    """The curve with the same cost of a read that gives this rate for such chunks."""
    each = max(shape.per_read_s, shape.latency_s / IN_FLIGHT)
    return replace(shape, bytes_per_s=1 / max(1 / rate - each / chunk, 0.1 / rate))


def rates_of(m: Manifest) -> Rates:
    """How fast this machine computes with such weights, measured now."""
    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2:
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    backend = open_backend("cpu", threads_for(m, RunConfig()))
    try:
        return measure_rates(backend, main_codec(sizes), hidden=m.facts.hidden_size, gated=m.facts.gated)
    finally:
        backend.close()


def facts(args: argparse.Namespace) -> list[str]:
    """The machine and how to repeat this; names no host and no folder."""
    place = place_of(args.store or args.relu)
    disk = (*place.device.split(", ")[1:2], f"{place.kind} disk")[0]
    words = ["python", "benchmarks/caps.py", *([args.store.name] if args.store else [])]
    for name in ("checkpoint", "gguf", "relu", "relu_checkpoint"):
        value: Path | None = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", value.name] if value else []
    words += ["--llama-python", "PYTHON"] if args.llama_python else []
    words += ["--caps", *(f"{cap / GB:g}GB" for cap in args.caps), "--rounds", str(args.rounds), "-n", str(args.tokens)]
    words += ["--prompt", str(args.prompt), "--context", str(args.context)]
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    return [
        f"{machine.compute_threads()} cores ({machine.processor_name()}), "
        f"{psutil.virtual_memory().total / GB:.0f} GB of memory, {place.filesystem} on a {disk}, {system}",
        f"{datetime.now(UTC):%Y-%m-%d}; load average before: {os.getloadavg()[0]:.1f}; before each run "
        + ("the whole page cache was dropped" if may_drop_everything() else "the files' pages were dropped"),
        f"`{' '.join(words)}`",
    ]


def notes(m: Manifest, who: Sequence[Contender], disk: dict[str, Any], rates: Rates) -> list[str]:
    """What the tables of one model rest on."""
    f, names = m.facts, [c.name for c in who]
    curve = disk["known"]
    return [
        f"{m.weight_bytes() / GB:.2f} GB of weights: hidden {f.hidden_size}, FFN {f.intermediate_size} "
        f"({f.activation}), {f.num_layers} layers, {f.num_heads} heads, vocabulary {f.vocab_size}.",
        f"Rates: memory {rates.dram / GB:.1f}, matrices {rates.linear / GB:.1f}, neurons {rates.bundle / GB:.1f} GB/s. "
        f"Curve known before: {curve['bytes_per_s'] / GB:.2f} GB/s, {curve['per_read_s'] * 1e6:.0f} us a read "
        f"({disk['known_source']}).",
        *(
            f"{c.name} computes another function here: the SiLU model of as many bytes."
            for c in who
            if not c.comparable
        ),
        *(f"Left out: {name} (no {what})." for name, what in WANTED.items() if name not in names),
    ]


class Board:
    """One model: its contenders, its runs so far."""

    def __init__(self, label: str, store: Path, who: Sequence[Contender], args: argparse.Namespace) -> None:
        opened = open_store(store)
        self.label, self.who, self.args = label, who, args
        self.runs: list[Run] = []
        say(f"{label}: measuring rates and the disk's curve")
        self.rates = rates_of(opened.manifest)
        self.disk, self.curves = disk_of(opened, args.probe)
        ids = ids_of(None, opened.manifest.facts.vocab_size, args.prompt + args.tokens)
        self.job = {
            "prompt": ids[: args.prompt], "script": ids[args.prompt :], "rates": asdict(self.rates),
            "context": min(args.context, opened.manifest.facts.context_length), "threads": machine.compute_threads(),
        }  # fmt: skip
        self.notes = notes(opened.manifest, who, self.curves, self.rates)

    def round(self, number: int) -> None:
        """Every cap, every contender, once."""
        for cap in self.args.caps:
            for who in self.who:
                run = compete(who, cap, self.job, self.disk, timeout=self.args.timeout)
                self.runs.append(run)
                middle = f"{sorted(run.tokens)[len(run.tokens) // 2]:.2f} s/token, " if run.tokens else ""
                size = f"{sum(run.device) / len(run.device) / GB:.2f} GB/token, " if run.device else ""
                text = f"{middle}{size}peak {run.peak / GB:.3f} GB, {run.wall_s:.0f} s in all"
                say(f"round {number + 1}, {self.label}, {cap / GB:.3g} GB, {who.name}: {run.status}, {text}")
                if run.error:
                    say(f"  {run.error.splitlines()[-1]}")

    def to_json(self) -> dict[str, Any]:
        """Tables and all runs."""
        comparable = frozenset(c.name for c in self.who if c.comparable)
        ends = {r.contender: r.end for r in self.runs if r.status == "ok"}
        versions = ", ".join(f"{name} {end['version']}" for name, end in ends.items())
        reader = [f"Ours reads with {ends[OURS]['reader']}."] if OURS in ends else []
        return {
            "label": self.label, "notes": [*self.notes, f"Versions: {versions}.", *reader],
            "rates": asdict(self.rates), "disk": self.curves,
            "tables": summarize(self.runs, comparable), "runs": [r.to_json() for r in self.runs],
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        with fresh_group(max(args.caps)):
            pass
    except NoCgroupError as e:
        print(f"{e}; these measurements need one (try as root)", file=sys.stderr)
        return 2
    said = facts(args)
    make_gguf(args)
    boards = []
    if args.store:
        who = contenders(args, args.store, args.checkpoint, same=True)
        boards.append(Board("Dense (SiLU)", args.store, who, args))
    if args.relu:
        who = contenders(args, args.relu, args.relu_checkpoint, same=False)
        boards.append(Board("Sparse (ReLU)", args.relu, who, args))
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(args.rounds):
        for board in boards:
            board.round(number)
        result = {"facts": said, "rounds": number + 1, "models": [board.to_json() for board in boards]}
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{args.name}.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
