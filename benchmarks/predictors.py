"""Predictors against exact selection on the store as it was packed, interleaved, each run in a cgroup of the cap.

    python benchmarks/predictors.py PACKED CALIBRATED --memory 3.4GB [-n 12] [--rounds 3] [--predictor NAME ...]

PACKED is a store as `pack` wrote it, CALIBRATED the same model after `calibrate`; every run replays the same tokens,
the page cache dropped before. Needs a memory cgroup that can be made (root). Results: `docs/sparsity.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peers.cgroup import fresh_group
from flashinfer.bench.generate import Sample, Setting, continue_greedily, run_setting
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.store import open_store
from flashinfer.text import load_tokenizer
from flashinfer.units import parse_size

PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
ROOM = 0.97
"""Share of the group's limit that the run is given as its cap: the rest is the harness's own."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("packed", type=Path)
    p.add_argument("calibrated", type=Path)
    p.add_argument("--memory", default="3.4GB")
    p.add_argument("-n", "--tokens", type=int, default=12)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--predictor", action="append", help="of the calibrated store; default: certified, low-rank")
    p.add_argument("--json", action="store_true")
    return p.parse_args()


def decode(
    store: Path, setting: Setting, lookahead: bool | None, prompt: list[int], script: list[int], cap: int
) -> Any:
    run = replace(RunConfig(), lookahead=lookahead)
    return asdict(run_setting(store, setting, prompt, script, run, Cap(memory=int(cap * ROOM))))


def in_group(limit: int, function: Any, *given: Any) -> Any:
    """Call it in a process of its own in a cgroup of that limit, with a cold page cache."""
    with fresh_group(limit) as group:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_call, args=(theirs, str(group.path), function, given))
        process.start()
        found = ours.recv()
        process.join()
    return found


def _call(pipe: Any, group: str, function: Any, given: tuple[Any, ...]) -> None:
    (Path(group) / "cgroup.procs").write_text("0")
    pipe.send(function(*given))


def prepared(store: Path, tokens: int, cap: int) -> tuple[list[int], list[int]]:
    """The prompt, and what the model says after it."""
    opened = open_store(store)
    tokenizer = load_tokenizer({name: opened.path_of(entry) for name, entry in opened.manifest.text.items()})
    prompt = tokenizer.encode(PROMPT)
    with Model.open(store, Cap(memory=int(cap * ROOM)), context=len(prompt) + tokens) as model:
        return prompt, continue_greedily(model, prompt, tokens)


def main() -> int:
    a = arguments()
    cap = parse_size(a.memory)
    prompt, script = in_group(cap, prepared, a.packed, a.tokens, cap)
    rows: dict[str, tuple[Path, Setting, bool | None]] = {
        "exact (packed)": (a.packed, Setting("cached", "time", "exact"), None)
    }
    for name in a.predictor or ["certified", "low-rank"]:
        rows[name] = a.calibrated, Setting("cached", "time", name), False
        if name.split(":")[0] == "low-rank":
            rows[f"{name}, lookahead"] = a.calibrated, Setting("cached", "time", name), True
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(a.rounds):
        for name, (store, setting, lookahead) in rows.items():
            samples[name].append(in_group(cap, decode, store, setting, lookahead, prompt, script, cap))
            s = Sample(**samples[name][-1])
            print(f"{name}: {s.tokens_per_second:.3g} tokens/s, waits {s.io_wait_ms:.0f} ms", file=sys.stderr)
    if a.json:
        print(json.dumps({"cap": cap, "tokens": a.tokens, "rounds": a.rounds, "samples": samples}))
        return 0
    print(f"| {a.memory} | MB read | reads | hits | waits ms | compute ms | s/token (range) | read time / exact |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    base = median(s["io_wait_ms"] for s in samples["exact (packed)"])
    for name, some in samples.items():
        m = {
            key: median(s[key] for s in some) for key in ("bytes_read", "reads", "hit_rate", "io_wait_ms", "compute_ms")
        }
        seconds = sorted(1.0 / s["tokens_per_second"] for s in some)
        print(
            f"| {name} | {m['bytes_read'] / 1e6:.0f} | {m['reads']:.0f} | {m['hit_rate']:.0%} | "
            f"{m['io_wait_ms']:.0f} | {m['compute_ms']:.0f} | "
            f"{median(seconds):.3f} ({seconds[0]:.3f}-{seconds[-1]:.3f}) | "
            f"{base / max(1e-9, m['io_wait_ms']):.2f}x less |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
