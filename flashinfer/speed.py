"""How fast a plan is: bytes and seconds of a token, predicted from a manifest, a plan, a disk curve and rates. Pure.

What the engine does decides the form (`model/dense.py`, `model/neurons.py`, `model/decoder.py`):

- A streamed dense matrix is double-buffered: the next block is read while this one is multiplied, so the matrix takes
  the longer of the two. A resident one takes its arithmetic.
- The misses of a layer are known only after its decision product. They are read in batches of half the read buffer,
  a batch being computed while the next is read: nothing overlaps within one batch, and of b batches the shorter of
  reading and arithmetic is hidden but for its b-th part.
- Rows of tables that are not resident are waited for. Cache bookkeeping and small operations add constants.

Bytes follow the planner (`io/plan.py`): aligned widening, holes read through, what half a read buffer takes at
once. They rest on which neurons fire (`Firing`), which is assumed until a store has statistics of its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashinfer.config import TILE_NEURONS, TILE_ROWS, TILE_TOKENS, DiskCurve, Rates, RunConfig
from flashinfer.store import Manifest, NeuronLayer
from flashinfer.store.geometry import ASSUMED_DENSITY, ASSUMED_KINSHIP, ASSUMED_REUSE

if TYPE_CHECKING:
    from flashinfer.memory import Mode, Plan

LAYER_SECONDS = 1e-3
"""Norms, rotary, attention of a short context and the calls around them, in a layer (measured: 0.7-1.5 ms)."""
BATCH_SECONDS = 400e-6
"""Planning and bookkeeping around a batch of misses, and RECORD_SECONDS those for each record needed (measured
together: 12-18 ms for 27 batches of the 8,640 records of a dense layer, 0.6 ms for one batch of 280)."""
RECORD_SECONDS = 0.4e-6
TILE_SECONDS = 80e-6
"""Calls around a tile of neurons, and BLOCK_SECONDS those around a streamed block of rows (measured)."""
BLOCK_SECONDS = 100e-6
DRAM_BOUND = 0.6
"""Share of the arithmetic's time that plain reading takes, from which the memory bounds it and not the cores."""

TABLES = ("embed.weight", "embed.positions")
"""Matrices of which a token looks up a row."""

Bound = Literal["disk", "DRAM", "arithmetic"]


@dataclass(frozen=True)
class Firing:
    """Which neurons fire and come back.

    density: share of a layer's neurons that one token needs. hit_rate: share of needed records found in slots, where
    measured under the very plan; else it follows from the share of slots and `reuse` (`store.geometry.ASSUMED_REUSE`).
    """

    density: float = ASSUMED_DENSITY
    reuse: float = ASSUMED_REUSE
    hit_rate: float | None = None
    source: Literal["assumed", "measured"] = "assumed"

    def needed(self, tokens: int) -> float:
        """Share of a layer's neurons that so many tokens in a row need together."""
        return 1.0 - float((1.0 - self.density) ** (tokens**ASSUMED_KINSHIP))

    def missing(self, needed: float, kept: float) -> float:
        """Share of a layer's records to be read, of those needed, when slots keep that share of them."""
        if self.hit_rate is not None:
            return needed * (1.0 - self.hit_rate)
        return max(needed * float((1.0 - kept) ** self.reuse), needed - kept)


def firing_of(manifest: Manifest) -> Firing:
    """What is known of this store: nothing yet. A section of measured statistics (`manifest.sections`) is read here."""
    return Firing() if manifest.facts.sparse else Firing(density=1.0)


@dataclass(frozen=True)
class Conditions:
    """Under which a plan is judged. `run` holds the planner's knobs; `disk` and `rates` say what things take."""

    manifest: Manifest
    run: RunConfig
    alignment: int
    mode: Mode
    disk: DiskCurve
    rates: Rates
    firing: Firing


@dataclass(frozen=True)
class Cost:
    """What a part of a step takes: bytes and reads of the disk, weight bytes multiplied with, seconds.

    `disk` and `compute` are seconds of reads and arithmetic alone, `seconds` the wall time they add together.
    """

    read: float = 0.0
    reads: float = 0.0
    weights: float = 0.0
    disk: float = 0.0
    compute: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read, self.reads + other.reads, self.weights + other.weights,
            self.disk + other.disk, self.compute + other.compute, self.seconds + other.seconds,
        )  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One token of decoding, and the first one after a prompt of `prompt_tokens`. Bytes and seconds.

    dram_bytes: weights and keys and values that arithmetic reads. disk, dram and compute seconds are those of each
    alone; `token_seconds` is what they take together. ffn_free_seconds: were the feed-forward layers free.
    load_seconds: filling what stays resident, before the prompt.
    """

    flash_bytes: float
    flash_reads: float
    dram_bytes: float
    disk_seconds: float
    dram_seconds: float
    compute_seconds: float
    token_seconds: float
    ffn_free_seconds: float
    load_seconds: float
    first_token_seconds: float
    prompt_tokens: int
    bound: Bound
    firing: Firing

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed."""
        return 1.0 / self.token_seconds

    def to_json(self) -> dict[str, Any]:
        """All fields, plain, with the speed."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def predict(c: Conditions, plan: Plan, *, prompt_tokens: int) -> Prediction:
    """What a run under this plan will be like, in the middle of its context."""
    f = c.manifest.facts
    ffn, rest = step_cost(c, plan, 1)
    token = ffn + rest
    kv = 4.0 * f.num_layers * f.num_kv_heads * f.head_dim * plan.context  # keys and values of half the context
    dram = (token.weights + kv) / c.rates.dram
    compute = token.compute + kv / c.rates.dram
    bound: Bound = "disk" if token.disk > compute else "DRAM" if dram > DRAM_BOUND * compute else "arithmetic"
    filled = plan.weight_resident + plan.weight_slots
    return Prediction(
        flash_bytes=token.read,
        flash_reads=token.reads,
        dram_bytes=token.weights + kv,
        disk_seconds=token.disk,
        dram_seconds=dram,
        compute_seconds=compute,
        token_seconds=token.seconds + kv / c.rates.dram,
        ffn_free_seconds=rest.seconds + kv / c.rates.dram,
        load_seconds=c.disk.seconds(filled / c.run.io.max_extent, filled, c.run.io.threads),
        first_token_seconds=_prompt_seconds(c, plan, prompt_tokens),
        prompt_tokens=prompt_tokens,
        bound=bound,
        firing=c.firing,
    )


def _prompt_seconds(c: Conditions, plan: Plan, tokens: int) -> float:
    """The prompt chunk by chunk; the head is multiplied with its last token only."""
    whole, last = divmod(tokens, c.run.prefill_chunk)
    chunks = {c.run.prefill_chunk: whole, last: 1 if last else 0}
    seconds = sum(n * sum(cost.seconds for cost in step_cost(c, plan, k, head=False)) for k, n in chunks.items() if n)
    head = matrix_cost(c, head_of(c.manifest), plan, 1).seconds
    return seconds + head


def step_cost(c: Conditions, plan: Plan, tokens: int, *, head: bool = True) -> tuple[Cost, Cost]:
    """A step of so many tokens: the feed-forward layers (with their decision matrices), and all the rest."""
    m = c.manifest
    ffn, rest = Cost(), Cost(compute=LAYER_SECONDS * len(m.layers), seconds=LAYER_SECONDS * len(m.layers))
    for name in multiplied(m):
        if name != head_of(m):
            cost = matrix_cost(c, name, plan, tokens)
            ffn, rest = (ffn + cost, rest) if ".ffn." in name else (ffn, rest + cost)
    for name in TABLES:
        rest = rest + lookup_cost(c, name, plan, tokens)
    if head:
        rest = rest + matrix_cost(c, head_of(m), plan, tokens)
    for layer, slots in zip(m.layers, plan.slots, strict=True):
        ffn = ffn + neurons_cost(c, layer, slots, plan.neuron_staging, tokens)
    return ffn, rest


def head_of(m: Manifest) -> str:
    """The matrix whose product is the logits."""
    return "embed.weight" if m.facts.tied_head else "head.weight"


def multiplied(m: Manifest) -> list[str]:
    """Dense matrices a token is multiplied with: tables that are only looked up are not among them."""
    return [name for name, t in m.tensors.items() if len(t.shape) == 2 and (name not in TABLES or name == head_of(m))]


def matrix_cost(c: Conditions, name: str, plan: Plan, tokens: int) -> Cost:
    """Multiplying with a dense matrix; streamed through `plan.dense_staging` where it is not resident."""
    t = c.manifest.tensors[name]
    rate = c.rates.linear if tokens == 1 else c.rates.linear_prompt / math.ceil(tokens / TILE_TOKENS)
    compute = t.bytes / rate
    if name in plan.resident:
        return Cost(weights=t.bytes, compute=compute, seconds=compute)
    width = t.bytes // t.shape[0]
    rows = max(1, (plan.dense_staging - 2 * c.alignment) // width // TILE_ROWS) * TILE_ROWS
    whole, rest = divmod(t.shape[0], rows)
    extent, blocks = c.run.io.max_extent, whole + (rest > 0)
    reads = whole * math.ceil(rows * width / extent) + math.ceil(rest * width / extent)
    read = t.bytes + blocks * _widening(rows * width, c.alignment)
    compute += blocks * BLOCK_SECONDS
    disk = c.disk.seconds(reads, read, min(c.run.io.threads, 2 * reads / blocks))
    return Cost(read, reads, t.bytes, disk, compute, max(disk, compute))


def lookup_cost(c: Conditions, name: str, plan: Plan, tokens: int) -> Cost:
    """Rows of a table, each read alone where it is not resident."""
    t = c.manifest.tensors.get(name)
    if t is None or name in plan.resident:
        return Cost()
    width = t.bytes // t.shape[0]
    read = tokens * (width + _widening(width, c.alignment))
    disk = c.disk.seconds(tokens, read, min(tokens, TILE_TOKENS, c.run.io.threads))
    return Cost(read, tokens, 0.0, disk, 0.0, disk)


def neurons_cost(c: Conditions, n: NeuronLayer, slots: int, half: int, tokens: int) -> Cost:
    """The neurons of one layer, `slots` of whose records may stay and `half` bytes of which are read at once."""
    sparse = c.manifest.facts.sparse and c.mode != "naive"
    active = c.firing.needed(tokens) if sparse else 1.0
    kept = slots / n.records if c.mode == "cached" else 0.0
    touched = 1.0 - (1.0 - active) ** n.bundles_per_record
    missing = c.firing.missing(touched, kept) if sparse else 1.0 - kept
    tiles = n.neurons * active / TILE_NEURONS if tokens == 1 else n.neurons / TILE_NEURONS
    read, reads = _neuron_reads(c, n, missing, max(1.0, tiles), half, scattered=sparse)
    each = n.record_bytes if sparse else c.run.io.max_extent
    disk = c.disk.seconds(reads, read, min(c.run.io.threads, reads, max(1.0, 2 * half / each)))
    batches = max(1.0, disk / c.disk.seconds(half / each, half, c.run.io.threads))
    rate = c.rates.bundle if tokens == 1 else c.rates.bundle_prompt / math.ceil(tokens / TILE_TOKENS)
    compute = tiles * (TILE_SECONDS + TILE_NEURONS * n.bundle_bytes / rate)
    bookkeeping = touched * n.records * RECORD_SECONDS + batches * BATCH_SECONDS
    together = max(disk, compute) + min(disk, compute) / batches
    weights = active * n.neurons * n.bundle_bytes
    return Cost(read, reads, weights, disk, compute + bookkeeping, together + bookkeeping)


def _neuron_reads(
    c: Conditions, n: NeuronLayer, missing: float, tiles: float, half: int, *, scattered: bool
) -> tuple[float, float]:
    """Bytes and reads of the records missing, a share of the layer: in one run at its end, or anywhere."""
    if missing <= 0.0:
        return 0.0, 0.0
    if not scattered:
        read = missing * n.records * n.record_bytes
        batches = min(tiles, max(1.0, read / half))
        again = n.record_bytes if TILE_NEURONS % n.bundles_per_record else 0  # a record two batches share
        read += (batches - 1) * again + batches * _widening(n.record_bytes, c.alignment)
        return read, max(batches, read / c.run.io.max_extent)
    read, reads = _runs(c, n, missing, c.run.io.max_gap)
    # where not even a tile fits with its holes, tiles are read one by one without them
    return (read, reads) if read <= tiles * half else _runs(c, n, missing, 0)


def _runs(c: Conditions, n: NeuronLayer, missing: float, max_gap: int) -> tuple[float, float]:
    """Bytes and reads when each record is missing independently and holes up to `max_gap` are read through.

    A hole of g records comes with probability missing * (1 - missing) ** g.
    """
    size, misses = n.record_bytes, missing * n.records
    extra = _widening(size, c.alignment)
    holes, there = (max_gap + extra) // size, 1.0 - missing
    wide = there ** (holes + 1)
    bridged = there * (1.0 - (holes + 1) * there**holes + holes * wide) / missing
    reads = min(misses, 1.0 + max(0.0, misses - 1.0) * wide)
    read = misses * size + max(0.0, misses - 1.0) * bridged * size + reads * extra
    return min(read, n.bytes), max(reads, read / c.run.io.max_extent)


def _widening(size: int, alignment: int) -> int:
    """What a read of a multiple of `size` bytes at a multiple of it grows by, on average."""
    return alignment - math.gcd(size, alignment)
