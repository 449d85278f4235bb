"""The reads of a sparse model, as decoding makes them, against fio with the same sizes of read.

    python benchmarks/sparse_reads.py STORE [--memory 3.4GB] [--predictor NAME] [--text FILE] [-n 8] [--rounds 7]

The engine decodes; after `--warm` tokens every batch of demand reads of the next `-n` is noted, and when it was waited
for. Then the store is closed, and in every round three run, each time another one first:

- *as decoded*: the same submits and waits in the same order through a new reader, nothing computed in between. A
  layer's misses are known only when the layer before is done, so its reads begin when that one's have ended;
- *two under way*: the same batches, always two of them submitted, so that no batch's end leaves the disk idle;
- *fio* on the same file at random places, direct, io_uring with as many reads in flight as our reader may have at most
  (or so many threads), its sizes drawn from the sizes of our reads (fifty steps).

Of ours, only useful bytes count: records that were missing, and neither the holes between nor what alignment adds.
Reading ahead by prediction is off, so that all reads are of misses. Given are medians (range) over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from flashinfer.bench.fio import Fio, find_fio
from flashinfer.bench.generate import continue_greedily
from flashinfer.bench.io_figures import Combination
from flashinfer.bench.place import place_of
from flashinfer.config import Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import FlashInferError
from flashinfer.io import AlignedBuffer, Extents, Pending, Reader, UringReader, open_reader
from flashinfer.model.neurons import NEURON_FILE
from flashinfer.request import files_of
from flashinfer.store import Store, open_store
from flashinfer.text import load_tokenizer
from flashinfer.tune.text import read_tokens
from flashinfer.units import format_size, parse_size

Bytes = npt.NDArray[np.uint8]
PROMPT = "Once upon a time, in a village by the sea, there lived an old clock maker who"
START = 16
"""Tokens of a text that are the prompt."""
STEPS = 50
"""Sizes that fio is given; each stands for two per cent of our reads."""


@dataclass
class Log:
    """Batches of reads of the neuron file, and in which order they were submitted (its number) and waited for (~it)."""

    batches: list[Extents] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    on: bool = False

    def total(self) -> int:
        """Bytes read."""
        return sum(batch.total for batch in self.batches)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each read."""
        return np.concatenate([batch.lengths for batch in self.batches])

    def mean(self) -> int:
        """Bytes of a read, on average."""
        return round(float(self.lengths().mean()))


class NotingReader:
    """A reader that notes what is asked of it."""

    def __init__(self, reader: Reader, log: Log) -> None:
        self._reader, self._log = reader, log
        self.alignment, self.direct, self.note, self.stats = (
            reader.alignment, reader.direct, reader.note, reader.stats
        )  # fmt: skip

    def submit(self, file: int, extents: Extents, target: Bytes) -> Pending:
        """As `Reader.submit`."""
        pending = self._reader.submit(file, extents, target)
        if not self._log.on or file != NEURON_FILE:
            return pending
        self._log.order.append(len(self._log.batches))
        self._log.batches.append(extents)
        return _NotingPending(pending, self._log, self._log.order[-1])

    def close(self) -> None:
        """As `Reader.close`."""
        self._reader.close()


@dataclass(frozen=True)
class _NotingPending:
    pending: Pending
    log: Log
    number: int

    def wait(self) -> None:
        self.log.order.append(~self.number)
        self.pending.wait()


@dataclass(frozen=True)
class Recorded:
    """What decoding asked for, and how many bytes of it were of missing records."""

    log: Log
    useful: int
    hit_rate: float


def record(
    store: Store, prompt: Sequence[int], script: Sequence[int], *, warm: int, cap: Cap, run: RunConfig
) -> Recorded:
    """Decode the script, and note the reads of all its tokens but the first `warm`.

    Raises:
        FlashInferError: nothing sparse was read; or what opening and decoding raise.
    """
    log = Log()
    sizes = {store.geometry(i).record_bytes for i in range(store.manifest.facts.num_layers)}
    if len(sizes) > 1:
        raise FlashInferError("the layers of this store have records of several sizes; use one with a single size")
    with Model.open(
        store, cap, run=run, context=len(prompt) + len(script),
        reader_of=lambda paths: NotingReader(open_reader(paths, run.io), log),
    ) as model:  # fmt: skip
        session, account = model.session(), model.ledger.decode
        model.step(session, prompt)
        for i, token in enumerate(script):
            if i == warm:
                log.on, before = True, (account.misses, account.hits)
            model.step(session, [token])
        log.on = False
        misses, hits = account.misses - before[0], account.hits - before[1]
    if not misses or not log.batches:
        raise FlashInferError("decoding read no missing neurons: lower --memory, or use a sparse model")
    return Recorded(log, misses * sizes.pop(), hits / (hits + misses))


def tokens_of(
    store: Store, text: Path | None, count: int, cap: Cap, run: RunConfig
) -> tuple[Sequence[int], Sequence[int]]:
    """A prompt, and `count` tokens after it: of the text, or what the model says itself."""
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    if text is not None:
        ids = read_tokens(text, tokenizer, START + count, least=START + count).ids.tolist()
        return ids[:START], ids[START:]
    prompt = tokenizer.encode(PROMPT)
    with Model.open(store, cap, run=run, context=len(prompt) + count) as model:
        return prompt, continue_greedily(model, prompt, count)


def as_decoded(reader: Reader, log: Log, places: Iterator[Bytes]) -> None:
    """Submits and waits in the order in which decoding made them."""
    pending: dict[int, Pending] = {}
    for step in log.order:
        if step >= 0:
            pending[step] = reader.submit(NEURON_FILE, log.batches[step], next(places))
        else:
            pending.pop(~step).wait()
    for last in pending.values():
        last.wait()


def two_under_way(reader: Reader, log: Log, places: Iterator[Bytes]) -> None:
    """Always the next batch submitted before the last one is waited for."""
    pending: list[Pending] = []
    for batch in log.batches:
        pending.append(reader.submit(NEURON_FILE, batch, next(places)))
        if len(pending) > 2:
            pending.pop(0).wait()
    for last in pending:
        last.wait()


def sizes_for_fio(lengths: npt.NDArray[np.int64], unit: int) -> str:
    """`bssplit`: the mean sizes of equal shares of our reads, in whole units."""
    groups = np.array_split(np.sort(lengths), min(STEPS, len(lengths)))
    sizes = [max(unit, round(float(group.mean()) / unit) * unit) for group in groups]
    share, extra = divmod(100, len(sizes))
    weights: dict[int, int] = {}
    for i, size in enumerate(sizes):
        weights[size] = weights.get(size, 0) + share + (i < extra)
    return ":".join(f"{size}/{weight}" for size, weight in weights.items())


def replay(store: Store, found: Recorded, io: IoConfig, rounds: int) -> dict[str, list[float]]:
    """Bytes per second of each, by round; of ours, useful ones. Raises FlashInferError: no fio, or it fails."""
    paths, log = files_of(store), found.log
    program = find_fio()
    if program is None:
        raise FlashInferError("fio is not on the PATH; install it")
    fio = Fio(program, paths[NEURON_FILE])
    speeds: dict[str, list[float]] = {"as decoded": [], "two under way": [], "fio": []}
    seconds = 1.0
    room = 4 * max(batch.total for batch in log.batches)
    with contextlib.closing(open_reader(paths, io)) as reader, AlignedBuffer(room) as buffer:
        buffer.array.fill(1)
        places = cycle(np.array_split(buffer.array, 4))
        ring = isinstance(reader, UringReader)
        same = Combination("random", log.mean(), io.in_flight, "io_uring" if ring else "threads")
        split = [f"--bssplit={sizes_for_fio(log.lengths(), reader.alignment)}", f"--blockalign={reader.alignment}"]
        for i in range(rounds):
            for name in [*speeds][i % 3 :] + [*speeds][: i % 3]:
                if name == "fio":
                    speeds[name].append(1e6 * fio.slice(same, seconds, split).mb_per_s)
                    continue
                started = time.perf_counter()
                (as_decoded if name == "as decoded" else two_under_way)(reader, log, places)
                seconds = time.perf_counter() - started
                speeds[name].append(found.useful / seconds)
    return speeds


def _span(values: Sequence[float], unit: float) -> str:
    v = sorted(value / unit for value in values)
    return f"{median(v):.0f} ({v[0]:.0f}-{v[-1]:.0f})"


def report(store: Store, found: Recorded, speeds: dict[str, list[float]], io: IoConfig) -> str:
    """Markdown: what was read, and how fast."""
    log, place = found.log, place_of(files_of(store)[NEURON_FILE])
    lengths = log.lengths()
    low, middle, high = (format_size(v) for v in np.quantile(lengths, (0.1, 0.5, 0.9)))
    lines = [
        f"{len(log.batches)} batches, {len(lengths)} reads ({len(lengths) / len(log.batches):.0f} a batch), "
        f"{format_size(log.total())}, of which {100 * found.useful / log.total():.1f} % useful; hits "
        f"{100 * found.hit_rate:.0f} %; sizes 10/50/90 %: {low}, {middle}, {high}; at most {io.in_flight} in flight; "
        f"{place.device}, {place.filesystem}",
        "",
        "| | MB/s | useful % of fio |",
        "| --- | --- | --- |",
    ]
    for name, values in speeds.items():
        ratio = [a / b for a, b in zip(values, speeds["fio"], strict=True)]
        lines.append(f"| {name} | {_span(values, 1e6)} | {_span(ratio, 0.01) if name != 'fio' else ''} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("store", type=Path)
    p.add_argument("--memory", type=parse_size, help="cap of the run (default: what the machine can spare)")
    p.add_argument("--predictor", default=RunConfig.predictor)
    p.add_argument("--text", type=Path, help="its tokens are decoded (default: what the model writes itself)")
    p.add_argument("-n", "--tokens", type=int, default=8, help="tokens whose reads are noted")
    p.add_argument("--warm", type=int, default=8, help="tokens decoded before")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", action="store_true")
    a = p.parse_args(argv)
    run = replace(RunConfig(), predictor=a.predictor, lookahead=False)
    load = os.getloadavg()[0]
    try:
        store = open_store(a.store)
        cap = Cap(memory=a.memory)
        prompt, script = tokens_of(store, a.text, a.warm + a.tokens, cap, run)
        found = record(store, prompt, script, warm=a.warm, cap=cap, run=run)
        speeds = replay(store, found, run.io, a.rounds)
    except FlashInferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if a.json:
        print(json.dumps({"schema_version": 1, "useful": found.useful, "read": found.log.total(), "speeds": speeds}))
    else:
        print(report(store, found, speeds, run.io), f"\nload average when it began: {load:.2f}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
