"""The cache study: a recording replayed through policies at many budgets, with the optimum as the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashinfer.bench.replay import Blended, Optimum, Ranked, Replayed, Runtime, Step, misses
from flashinfer.cache import WindowCache
from flashinfer.errors import RecordingError
from flashinfer.recording import Header, Index, Recording
from flashinfer.store import Geometry, open_store

Kind = Literal["window + LFU", "window", "LRU", "LFU", "blend", "optimum"]
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Budgets of the table where nobody says."""


@dataclass(frozen=True)
class Setting:
    """One policy. `window` of those that have one: tokens they keep whole as far as the slots reach."""

    kind: Kind
    window: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        return self.kind.replace("window", f"window {self.window}")

    def make(self, records: int, slots: int, steps: Sequence[Step]) -> Replayed:
        """The policy, with its slots empty."""
        match self.kind:
            case "window":
                return Runtime(WindowCache(records, slots, window=self.window, retention="window"))
            case "window + LFU":
                return Runtime(WindowCache(records, slots, window=self.window, retention="frequency"))
            case "blend":
                return Blended(records, slots)
            case "optimum":
                return Optimum(records, slots, steps)
        return Ranked(records, slots, frequency=self.kind == "LFU")


def settings_for(windows: Sequence[int]) -> list[Setting]:
    """The columns of the table: both retentions of the runtime at each window, and what they are compared with."""
    ours = [Setting(kind, window) for window in windows for kind in ("window + LFU", "window")]
    return [*ours, Setting("LRU"), Setting("LFU"), Setting("blend"), Setting("optimum")]


@dataclass(frozen=True)
class Row:
    """What one policy missed with slots for that share of each layer's records.

    slots: of all layers. misses: records, of all counted tokens and layers.
    """

    setting: Setting
    share: float
    slots: int
    misses: int


@dataclass(frozen=True)
class Study:
    """The replay of one recording.

    tokens: decode tokens whose misses are counted; warm: those before them and the prompt's, which only fill the slots.
    records: of all layers. needed: by the counted tokens, over all layers. record_bytes: mean over the needed records,
    0 without a store.
    """

    header: Header
    tokens: int
    warm: int
    records: int
    needed: int
    record_bytes: float
    rows: tuple[Row, ...]

    def missed(self, row: Row) -> float:
        """Records missed per token."""
        return row.misses / self.tokens

    def hit_rate(self, row: Row) -> float:
        """Share of the needed records that were in a slot."""
        return 1 - row.misses / max(1, self.needed)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "policy": row.setting.kind, "window": row.setting.window if "window" in row.setting.kind else None,
                "share": row.share, "slots": row.slots, "hits": self.needed - row.misses, "misses": row.misses,
                "hit_rate": self.hit_rate(row), "missed_per_token": self.missed(row),
                "bytes_per_token": self.missed(row) * self.record_bytes,
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "tokens": self.tokens, "warm_tokens": self.warm, "records": self.records,
            "needed_per_token": self.needed / self.tokens, "record_bytes": self.record_bytes, "rows": rows,
        }  # fmt: skip


def geometries(recording: Recording, store: Path | None, bundles_per_record: int) -> list[Geometry]:
    """Which record holds which neuron: as in that store, or so many neurons in their original order.

    Raises:
        RecordingError: the store is of another model. StoreError: it cannot be used.
    """
    header = recording.header
    if store is None:
        return [Geometry(n, bundles_per_record, record_bytes=0, bundle_bytes=0, offset=0) for n in header.neurons]
    opened = open_store(store)
    f, neurons = opened.manifest.facts, tuple(layer.neurons for layer in opened.manifest.layers)
    if (f.family, f.hidden_size, neurons) != (header.family, header.hidden_size, header.neurons):
        raise RecordingError(
            f"recording {recording.path} is of {_model(header.family, header.hidden_size, header.neurons)}, store "
            f"{store} of {_model(f.family, f.hidden_size, neurons)}; give the store of the recorded model"
        )
    return [opened.geometry(i) for i in range(len(neurons))]


def _model(family: str, hidden: int, neurons: tuple[int, ...]) -> str:
    return f"a {family} model with hidden {hidden} and {len(neurons)} layers of {max(neurons)} neurons"


def steps_of(layer: Iterable[Sequence[Index]], geometry: Geometry, skip: int) -> list[Step]:
    """One layer's steps in records. Single tokens count, but for the first `skip` of them; prompt chunks never do."""
    steps: list[Step] = []
    for neurons in layer:
        sets = tuple(geometry.records_of(n) for n in neurons)
        needed = sets[0] if len(sets) == 1 else np.unique(np.concatenate(sets))
        skip -= len(sets) == 1
        steps.append(Step(sets, needed, counted=len(sets) == 1 and skip < 0))
    return steps


def study(
    recording: Recording,
    layout: Sequence[Geometry],
    *,
    shares: Sequence[float] = SHARES,
    settings: Sequence[Setting],
    skip: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Replay a recording through every policy at every budget, layer by layer; a layer at a time is in memory.

    shares: slots, as shares of each layer's records. skip: decode tokens at the beginning that only warm the slots.

    Raises:
        RecordingError: the recording is damaged or cut short, or holds no decode token beyond those.
    """
    missed = dict.fromkeys(product(shares, settings), 0)
    needed = size = tokens = warm = 0
    for i, geometry in enumerate(layout):
        progress(f"layer {i + 1} of {len(layout)}")
        steps = steps_of(recording.layer(i), geometry, skip)
        tokens = sum(step.counted for step in steps)
        warm = sum(len(step.sets) for step in steps) - tokens
        if not tokens:
            raise RecordingError(f"{recording.path} records {warm} tokens, none of them decoded after the first {skip}")
        here = sum(len(step.needed) for step in steps if step.counted)
        needed, size = needed + here, size + here * geometry.record_bytes
        for share, setting in missed:
            policy = setting.make(geometry.records, _slots(share, geometry), steps)
            missed[share, setting] += misses(policy, steps)
    slots = {share: sum(_slots(share, geometry) for geometry in layout) for share in shares}
    rows = tuple(Row(setting, share, slots[share], count) for (share, setting), count in missed.items())
    records = sum(geometry.records for geometry in layout)
    return Study(recording.header, tokens, warm, records, needed, size / max(1, needed), rows)


def _slots(share: float, geometry: Geometry) -> int:
    return round(share * geometry.records)
