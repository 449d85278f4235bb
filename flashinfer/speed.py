"""How fast a plan is: bytes and seconds of a token, predicted from a manifest, a plan, a disk curve and rates. Pure.

What the engine does decides the form (`model/dense.py`, `model/neurons.py`, `model/decoder.py`):

- What is known beforehand is read ahead (`model/stream.py`): the matrices that are not resident, and of a model without
  sparsity the neurons that have no slot. The disk works on while layers are computed, so a token takes the longer
  of these reads and all arithmetic, and then what it has to wait for:
- The misses of a layer are known only after its decision product. They are read in batches of half the read buffer,
  a batch being computed while the next is read: nothing overlaps within one batch, and of b batches the shorter of
  reading and arithmetic is hidden but for its b-th part.
- Rows of tables that are not resident are waited for. Cache bookkeeping and small operations add constants.
- Where a device computes on memory of its own, matrices that are not there are copied while others are computed; for
  the neurons that a layer needs it waits (`model/uploads.py`).

Bytes follow the planner (`io/plan.py`): aligned widening, holes read through, layers read from end to end where that
takes less time, what half a read buffer takes at once. They rest on which neurons fire (`Firing`), which is assumed
until a store has statistics of its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashinfer.choice import Choice
from flashinfer.config import TILE_NEURONS, TILE_ROWS, TILE_TOKENS, DiskCurve, Rates, RunConfig
from flashinfer.firing import Firing, mean_firing
from flashinfer.planned import neuron_reads, run_at_the_end, widening
from flashinfer.store import Manifest, NeuronLayer

if TYPE_CHECKING:
    from flashinfer.memory import DevicePlan, Mode, Plan

LAYER_SECONDS = 1e-3
"""Norms, rotary, attention of a short context and the calls around them, in a layer. Measured with torch: 0.7-1.5 ms;
the native core takes 0.13 to 0.3, so small models are faster than predicted, and for large ones the rest stands for
reads that come in bursts larger than the ring."""
BATCH_SECONDS = 400e-6
"""Planning and bookkeeping around a batch of misses, and RECORD_SECONDS those for each record needed (measured
together: 12-18 ms for 27 batches of the 8,640 records of a dense layer, 0.6 ms for one batch of 280)."""
RECORD_SECONDS = 0.4e-6
BLOCK_SECONDS = 100e-6
"""Calls around a streamed block of rows (measured)."""
DRAM_BOUND = 0.6
"""Share of the arithmetic's time that plain reading takes, from which the memory bounds it and not the cores."""

TABLES = ("embed.weight", "embed.positions")
"""Matrices of which a token looks up a row."""

Bound = Literal["disk", "DRAM", "PCIe", "VRAM", "arithmetic"]


@dataclass(frozen=True)
class Conditions:
    """Under which a plan is judged. `run` holds the planner's knobs; `disk` and `rates` say what things take;
    `firing` is by layer."""

    manifest: Manifest
    run: RunConfig
    alignment: int
    mode: Mode
    disk: DiskCurve
    rates: Rates
    firing: tuple[Firing, ...]
    choice: Choice

    @property
    def selects(self) -> bool:
        """Whether a step leaves neurons out."""
        return self.mode != "naive" and self.choice.selects(self.manifest.facts)


@dataclass(frozen=True)
class Cost:
    """What a part of a step takes: bytes and reads of the disk, weight bytes multiplied with, seconds.

    ahead: of reads that run while something else is computed. waited: of reads the step stands still for. compute: of
    arithmetic and bookkeeping. copied: bytes to a device; copying: of copies while something else is computed, lifting:
    of those the step stands still for.
    """

    read: float = 0.0
    reads: float = 0.0
    weights: float = 0.0
    ahead: float = 0.0
    waited: float = 0.0
    compute: float = 0.0
    copied: float = 0.0
    copying: float = 0.0
    lifting: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read, self.reads + other.reads, self.weights + other.weights,
            self.ahead + other.ahead, self.waited + other.waited, self.compute + other.compute,
            self.copied + other.copied, self.copying + other.copying, self.lifting + other.lifting,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Wall time of all parts together."""
        return max(self.ahead, self.compute, self.copying) + self.waited + self.lifting


@dataclass(frozen=True)
class Prediction:
    """One token of decoding, and the first one after a prompt of `prompt_tokens`. Bytes and seconds.

    dram_bytes: weights and keys and values that arithmetic reads. Where a device reads them in its own memory, they are
    vram_bytes; pcie_bytes are copied to it, and dram_bytes the same, read for that. disk, dram and compute seconds are
    those of each alone; `token_seconds` is what they take together. ffn_free_seconds: were the feed-forward layers
    free. load_seconds: filling what stays resident, before the prompt.
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
    pcie_bytes: float = 0.0
    vram_bytes: float = 0.0

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
    values = f.num_kv_heads * (f.head_dim + f.value_dim)
    kv = 2.0 * f.num_layers * values * plan.context  # keys and values of half the context
    there = plan.device is not None
    rate = c.rates.vram if there else c.rates.dram
    scan = (token.weights + kv) / rate
    dram = token.copied / c.rates.dram if there else scan
    compute, disk = token.compute + kv / rate, token.ahead + token.waited
    filled = plan.weight_resident + plan.weight_slots + (0 if plan.device is None else _kept_there(plan.device))
    return Prediction(
        flash_bytes=token.read,
        flash_reads=token.reads,
        dram_bytes=token.copied if there else token.weights + kv,
        disk_seconds=disk,
        dram_seconds=dram,
        compute_seconds=compute,
        token_seconds=token.seconds + kv / rate,
        ffn_free_seconds=rest.seconds + kv / rate,
        load_seconds=c.disk.seconds(filled / c.run.io.max_extent, filled, c.run.io.in_flight),
        first_token_seconds=_prompt_seconds(c, plan, prompt_tokens),
        prompt_tokens=prompt_tokens,
        bound=_bound(disk, token.copied / c.rates.pcie, compute, scan, there),
        firing=mean_firing(c.firing),
        pcie_bytes=token.copied,
        vram_bytes=token.weights + kv if there else 0.0,
    )


def _kept_there(device: DevicePlan) -> int:
    return device.weight_resident + device.weight_slots


def _bound(disk: float, copies: float, compute: float, scan: float, there: bool) -> Bound:
    """Which of these takes longest; of arithmetic also whether plain reading of what it reads would nearly, too."""
    if disk > max(compute, copies):
        return "disk"
    if copies > compute:
        return "PCIe"
    if scan > DRAM_BOUND * compute:
        return "VRAM" if there else "DRAM"
    return "arithmetic"


def _prompt_seconds(c: Conditions, plan: Plan, tokens: int) -> float:
    """The prompt chunk by chunk; the head is multiplied with its last token only."""
    whole, last = divmod(tokens, c.run.prefill_chunk)
    chunks = {c.run.prefill_chunk: whole, last: 1 if last else 0}
    seconds = sum(n * sum(step_cost(c, plan, k, head=False), Cost()).seconds for k, n in chunks.items() if n)
    head = matrix_cost(c, head_of(c.manifest), plan, 1).seconds
    return seconds + head


def step_cost(c: Conditions, plan: Plan, tokens: int, *, head: bool = True) -> tuple[Cost, Cost]:
    """A step of so many tokens: the feed-forward layers (with their decision matrices), and all the rest."""
    m = c.manifest
    ffn, rest = Cost(), Cost(compute=LAYER_SECONDS * len(m.layers)) + _kept_cost(c, plan.weight_adapter, tokens)
    for name in multiplied(m):
        if name != head_of(m):
            cost = matrix_cost(c, name, plan, tokens)
            ffn, rest = (ffn + cost, rest) if ".ffn." in name else (ffn, rest + cost)
    for name in TABLES:
        rest = rest + lookup_cost(c, name, plan, tokens)
    if head:
        rest = rest + matrix_cost(c, head_of(m), plan, tokens)
    for layer, (slots, near) in enumerate(zip(plan.slots, plan.near, strict=True)):
        ffn = ffn + neurons_cost(c, layer, slots, plan, tokens, near)
    return ffn, rest


def head_of(m: Manifest) -> str:
    """The matrix whose product is the logits."""
    return "embed.weight" if m.facts.tied_head else "head.weight"


def multiplied(m: Manifest) -> list[str]:
    """Dense matrices a token is multiplied with: tables that are only looked up are not among them."""
    return [name for name, t in m.tensors.items() if len(t.shape) == 2 and (name not in TABLES or name == head_of(m))]


def _kept_cost(c: Conditions, size: int, tokens: int) -> Cost:
    """Multiplying with matrices of so many bytes that are in memory."""
    rate = c.rates.linear if tokens == 1 else c.rates.linear_prompt / math.ceil(tokens / TILE_TOKENS)
    return Cost(weights=size, compute=size / rate)


def matrix_cost(c: Conditions, name: str, plan: Plan, tokens: int) -> Cost:
    """Multiplying with a dense matrix; streamed in pieces where it is not resident."""
    t, device = c.manifest.tensors[name], plan.device
    product = _kept_cost(c, t.bytes, tokens)
    if device is not None and name not in device.resident:
        product = product + Cost(copied=t.bytes, copying=t.bytes / c.rates.pcie)
    if name in plan.kept:
        return product
    width, piece = t.bytes // t.shape[0], plan.piece - 2 * c.alignment
    rows = max(1, (piece if device is None else min(piece, device.half)) // width // TILE_ROWS) * TILE_ROWS
    whole, rest = divmod(t.shape[0], rows)
    extent, blocks = c.run.io.max_extent, whole + (rest > 0)
    reads = whole * math.ceil(rows * width / extent) + math.ceil(rest * width / extent)
    read = t.bytes + blocks * widening(rows * width, c.alignment)
    ahead = c.disk.seconds(reads, read, _depth(c, plan))
    return product + Cost(read, reads, ahead=ahead, compute=blocks * BLOCK_SECONDS)


def _depth(c: Conditions, plan: Plan) -> float:
    """Reads of the stream in flight at a time: what the ring holds beside the piece in use."""
    each = min(c.run.io.max_extent, plan.piece or c.run.io.max_extent)
    return min(c.run.io.in_flight, max(1.0, (plan.ring - plan.piece) / each))


def lookup_cost(c: Conditions, name: str, plan: Plan, tokens: int) -> Cost:
    """Rows of a table, each read alone where it is not resident."""
    t = c.manifest.tensors.get(name)
    if t is None or name in plan.kept:
        return Cost()
    width = t.bytes // t.shape[0]
    read = tokens * (width + widening(width, c.alignment))
    disk = c.disk.seconds(tokens, read, min(tokens, TILE_TOKENS, c.run.io.in_flight))
    return Cost(read, tokens, waited=disk)


def neurons_cost(c: Conditions, layer: int, slots: int, plan: Plan, tokens: int, near: int = 0) -> Cost:
    """The neurons of one layer, `slots` of whose records may stay, and `near` more on a device."""
    n = c.manifest.layers[layer]
    kept = (slots + near) / n.records if c.mode == "cached" else 0.0
    up = Cost() if plan.device is None else _copy_cost(c, layer, near / n.records, tokens)
    if c.selects:
        return up + _selected_cost(c, n, c.firing[layer], kept, plan.neuron_staging, tokens)
    rate = c.rates.bundle if tokens == 1 else c.rates.bundle_prompt / math.ceil(tokens / TILE_TOKENS)
    size = n.neurons * n.bundle_bytes
    read, reads = run_at_the_end(c, n, 1.0 - kept, plan.piece)
    ahead = c.disk.seconds(reads, read, _depth(c, plan))
    pieces = read / (plan.piece or n.bytes)
    return up + Cost(read, reads, size, ahead, 0.0, size / rate + pieces * BLOCK_SECONDS)


def _copy_cost(c: Conditions, layer: int, near: float, tokens: int) -> Cost:
    """Copying to a device the neurons that so many tokens need, but for the share of records that is there."""
    n, firing = c.manifest.layers[layer], c.firing[layer]
    absent = 1.0 - near
    if c.selects:
        touched = firing.touched(tokens, n.bundles_per_record)
        found = firing.missing(tokens, n.bundles_per_record, near) / touched if near and touched else 1.0
        absent = found * firing.needed(tokens)
    size = absent * n.neurons * n.bundle_bytes
    return Cost(copied=size, lifting=size / c.rates.pcie)


def _selected_cost(c: Conditions, n: NeuronLayer, firing: Firing, kept: float, half: int, tokens: int) -> Cost:
    """The neurons of one layer that so many tokens need, of whose records that share is kept."""
    active, touched = firing.needed(tokens), firing.touched(tokens, n.bundles_per_record)
    missing = firing.missing(tokens, n.bundles_per_record, kept)
    tiles = n.neurons * (active if tokens == 1 or n.experts is not None else 1.0) / TILE_NEURONS
    read, reads = neuron_reads(c, n, missing, max(1.0, tiles), half)
    disk = c.disk.seconds(reads, read, min(c.run.io.in_flight, reads, max(1.0, 2 * half / n.record_bytes)))
    batches = max(1.0, disk / c.disk.seconds(half / n.record_bytes, half, c.run.io.in_flight))
    passes = math.ceil(_sharing(n, firing, tokens) / TILE_TOKENS)
    rate = c.rates.bundle if tokens == 1 else c.rates.bundle_prompt / passes
    compute = tiles * TILE_NEURONS * n.bundle_bytes / rate
    bookkeeping = touched * n.records * RECORD_SECONDS + batches * BATCH_SECONDS
    waited = disk - min(disk, compute) * (1.0 - 1.0 / batches)
    return Cost(read, reads, active * n.neurons * n.bundle_bytes, 0.0, waited, compute + bookkeeping)


def _sharing(n: NeuronLayer, firing: Firing, tokens: int) -> float:
    """Tokens of a prompt that a needed neuron is computed for: of an expert, those that get it."""
    return tokens if n.experts is None else tokens * firing.density / firing.needed(tokens)
