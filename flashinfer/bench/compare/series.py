"""All runs of a comparison: rounds interleaved, every result on disk as soon as a round is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashinfer import machine
from flashinfer.bench.cgroup import fresh_group
from flashinfer.bench.compare import plot
from flashinfer.bench.compare.contenders import Contender
from flashinfer.bench.compare.contest import Run, compete
from flashinfer.bench.compare.describe import GB, facts, model_notes, run_notes
from flashinfer.bench.compare.disk import disk_of, rates_of
from flashinfer.bench.compare.figures import summarize
from flashinfer.bench.compare.lineup import Lineup
from flashinfer.bench.compare.markdown import markdown
from flashinfer.bench.compare.task import Task
from flashinfer.config import Rates
from flashinfer.errors import CgroupError
from flashinfer.store import Store

SCHEMA_VERSION = 1
NAME = "compare"
"""Of the files of results."""


def check_groups(cap: int) -> None:
    """See that a memory cgroup of that size can be made. Raises CgroupError."""
    try:
        with fresh_group(cap):
            pass
    except CgroupError as e:
        raise CgroupError(f"{e}, or give --no-cgroup: then only ours keep a cap") from None


class Series:
    """The runs so far, and what they are held against. Making one measures the disk's curve and the rates."""

    def __init__(self, store: Store, lineup: Lineup, task: Task, command: str, say: Callable[[str], None]) -> None:
        self._lineup, self._task, self._say = lineup, task, say
        self._facts = facts(store.path_of(store.manifest.neurons), command, grouped=task.grouped)
        self.runs: list[Run] = []
        self.rounds = 0
        say("measuring rates and the disk's curve")
        backends = dict.fromkeys(c.rung.backend for c in lineup.contenders if c.rung is not None)
        self._rates: dict[str, Rates] = {name: rates_of(store.manifest, name) for name in backends}
        self._disk, self._curves = disk_of(store, task.probe)
        self._notes = [*model_notes(store.manifest, self._curves, self._rates), *lineup.notes]

    def run(self, out: Path) -> dict[str, Any]:
        """Every round, every cap, every contender; then who runs without a cap. What there is, is written to files of
        `out` after each round, and when an error or an interrupt ends it. Returns the result.

        Raises:
            CgroupError, StoreReadError, OSError, PlotError.
        """
        out.mkdir(parents=True, exist_ok=True)
        try:
            while self.rounds < self._task.rounds:
                for c, cap in self._order():
                    self._compete(c, cap)
                self.rounds += 1
                result = self.write(out)
        except BaseException:
            if self.rounds < self._task.rounds:
                self.write(out)
            raise
        return result

    def _order(self) -> Iterator[tuple[Contender, int | None]]:
        """One round: for every cap all who run under it, then those who run without."""
        for cap in self._task.caps:
            yield from ((c, cap) for c in self._lineup.contenders if c.capped and (c.caps is None or cap in c.caps))
        yield from ((c, None) for c in self._lineup.contenders if not c.capped)

    def _compete(self, c: Contender, cap: int | None) -> None:
        self._say(f"round {self.rounds + 1}, {_under(cap)}, {c.name} ...")
        task = self._task
        run = compete(c, cap, self._job(c), self._disk, timeout=task.timeout, grouped=task.grouped)
        self.runs.append(run)
        middle = f"{sorted(run.tokens)[len(run.tokens) // 2]:.3f} s/token, " if run.tokens else ""
        size = f"{sum(run.device) / len(run.device) / GB:.3f} GB/token, " if run.device else ""
        why = f" ({run.error.splitlines()[-1]})" if run.error else ""
        self._say(f"  {run.status}{why}, {middle}{size}peak {run.peak / GB:.3f} GB, {run.wall_s:.0f} s in all")

    def _job(self, c: Contender) -> dict[str, Any]:
        task = self._task
        job: dict[str, Any] = {
            "prompt": task.prompt, "script": task.script, "context": task.context, "threads": machine.compute_threads(),
        }  # fmt: skip
        if c.rung is None:
            return job | {"shards": str((task.scratch / "airllm" / c.model.resolve().name).resolve())}
        rates = asdict(self._rates[c.rung.backend])
        return job | {"rung": c.rung.name, "predictor": c.predictor, "kv_type": task.kv_type, "rates": rates}

    def to_json(self) -> dict[str, Any]:
        """Everything, plain: facts, figures and all runs without their logits."""
        contenders, script = self._lineup.contenders, self._task.script
        dram = {name: rates.dram for name, rates in self._rates.items()}
        return {
            "schema_version": SCHEMA_VERSION, "command": "bench compare", "complete": self.rounds == self._task.rounds,
            "rounds": self.rounds, "facts": self._facts,
            "contenders": [{"name": c.name, "what": c.what, "on": c.model.name} for c in contenders],
            "left_out": self._lineup.left_out,
            "notes": [*self._notes, *run_notes(self.runs, len(script))],
            "rates": {name: asdict(rates) for name, rates in self._rates.items()}, "disk": self._curves,
            "tables": summarize(self.runs, contenders, script, dram), "runs": [r.to_json() for r in self.runs],
        }  # fmt: skip

    def write(self, out: Path) -> dict[str, Any]:
        """The three files, as far as they can be made; returns the result. Raises OSError, PlotError."""
        result = self.to_json()
        rows = [row for row in result["tables"]["rows"] if row["s_per_token"] is not None]
        if rows and plot.can_plot():
            plot.draw(out / f"{NAME}.png", rows, f"{result['notes'][0].partition(':')[0]}, one token at a time")
        elif rows:
            result["notes"].append(plot.NOTE)
        (out / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / f"{NAME}.md").write_text(markdown(result), encoding="utf-8")
        return result


def _under(cap: int | None) -> str:
    return "no cap" if cap is None else f"{cap / GB:.3g} GB"
