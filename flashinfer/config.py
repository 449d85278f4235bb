"""Every default and every tile size, in one place. The CLI reads its defaults from here.

Tile sizes are part of the arithmetic: changing one changes the last bits of every logit
(`docs/architecture.md`, "Exact by construction"). They are constants, not options.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashinfer.units import KIB, MIB

TILE_ROWS = 128
"""Output rows of a dense matrix computed together (measured: 128 converts and multiplies 30 % faster than 64)."""
TILE_NEURONS = 64
"""FFN neurons computed together: the tail tile is padded with zeros."""
TILE_TOKENS = 16
"""Prompt tokens computed together in prefill; tiles are anchored to absolute positions."""
TILE_KEYS = 128
"""KV positions one attention tile covers, anchored to position 0."""

STORE_ALIGNMENT = 512
"""Default record alignment in bytes; readers widen extents to what the device asks for."""
FILE_ALIGNMENT = 4096
"""Regions and file ends in a store are aligned to this; a multiple of any device's direct-I/O unit."""
COPY_CHUNK = 8 * MIB
"""Largest piece `pack` converts or writes at once, in bytes."""
PACK_BLOCK = 16 * MIB
"""Bytes of records `pack` assembles at once; its peak memory is a few times this, for any model."""

EXPERT_WORK = 2 * MIB
"""Bytes of products and activations of experts' neurons computed together, one tile of neurons at the least."""

IoObjective = Literal["time", "bytes"]
Retention = Literal["frequency", "window"]
HostReaderName = Literal["auto", "io_uring", "threads"]
ReaderName = Literal["auto", "io_uring", "threads", "kvikio"]
BackendName = Literal["auto", "native", "torch"]
KvType = Literal["f32", "f16", "int8"]
KV_CODECS: dict[KvType, str] = {"f32": "f32", "f16": "f16", "int8": "int8g32"}
"""In which codec each position of a head is kept."""


@dataclass(frozen=True)
class DiskCurve:
    """Cost model of random reads: seconds = reads * per_read_s + bytes / bytes_per_s.

    `per_read_s` is the marginal cost of one more read with many in flight; `latency_s` what a read alone takes
    beyond its transfer, which counts where too few are in flight to hide it.
    """

    per_read_s: float = 12e-6
    bytes_per_s: float = 2.0e9
    latency_s: float = 60e-6

    def seconds(self, reads: float, size: float, depth: float) -> float:
        """Time of so many reads of `size` bytes together, at most `depth` of them in flight."""
        return reads * max(self.per_read_s, self.latency_s / max(1.0, depth)) + size / self.bytes_per_s

    @property
    def break_even_gap(self) -> int:
        """Bytes whose transfer costs as much as one more read: gaps below it are read through."""
        return int(self.per_read_s * self.bytes_per_s)


@dataclass(frozen=True)
class Rates:
    """Bytes per second a machine gets through, all its compute threads together.

    dram: plain reading. linear, bundle: weights of a dense matrix and of FFN neurons, converted and multiplied with
    one token; linear_prompt, bundle_prompt: with a tile of TILE_TOKENS of them. The defaults are the native backend
    at f16 on two Zen 4 cores that others use, too. Where a device computes on memory of its own: pcie: copies to it,
    vram: plain reading there.
    """

    dram: float = 25e9
    linear: float = 20e9
    bundle: float = 16e9
    linear_prompt: float = 4e9
    bundle_prompt: float = 4e9
    pcie: float = 12e9
    vram: float = 300e9


DEVICE_RATES = Rates(linear=150e9, bundle=80e9, linear_prompt=100e9, bundle_prompt=50e9)
"""What is assumed of a device with memory of its own. Nobody measured it: it only says that arithmetic there is faster
than copies to it, by which the plan chooses."""


@dataclass(frozen=True)
class IoConfig:
    """How records are read.

    reader: `auto` is io_uring where the kernel has and allows it, else threads. At most `depth` reads are in
    flight with the former, `threads` with the latter. With `kvikio`, what goes to a device's memory is read straight
    there, `threads` reads at once, and all else as with `auto`.
    """

    objective: IoObjective = "time"
    reader: ReaderName = "auto"
    depth: int = 256
    threads: int = 16
    max_extent: int = 1 * MIB
    disk: DiskCurve = DiskCurve()

    @property
    def in_flight(self) -> int:
        """Reads in flight at most."""
        return self.threads if self.reader == "threads" else self.depth

    @property
    def bounce(self) -> int:
        """Bytes of the host's memory through which reads to a device's memory may pass, for want of a way past it."""
        return (self.threads + 1) * BOUNCE_BUFFER if self.reader == "kvikio" else 0

    @property
    def max_gap(self) -> int:
        """Largest hole, in bytes, that one extent may read through under the objective."""
        return self.disk.break_even_gap if self.objective == "time" else 0


@dataclass(frozen=True)
class CacheConfig:
    """What stays in the slots."""

    window: int = 5
    retention: Retention = "frequency"


@dataclass(frozen=True)
class RunConfig:
    """Everything `load` can be told beside the memory caps."""

    io: IoConfig = IoConfig()
    cache: CacheConfig = CacheConfig()
    rates: Rates = Rates()
    backend: BackendName = "auto"
    """What computes on the CPU: auto is the native core where it was built, else torch."""
    predictor: str = "exact"
    """Who names the neurons a token needs: see `choice.choices`. exact gives exact output; others must be asked for."""
    max_ppl_increase: float = 0.01
    """Share of perplexity that the predictor `auto` may cost, as calibration measured it."""
    kv_type: KvType = "f32"
    """What keys and values are rounded to; f16 is an approximation."""
    threads: int = 0
    """Compute threads; 0 means the cores this process may run on."""
    adapter: Path | None = None
    """A LoRA adapter to apply, as the directory peft saved."""
    prefill_chunk: int = 128
    """Prompt tokens per chunk: each needed record is read once per chunk."""
    staging: int = 4 * MIB
    """Bytes of one half of the buffer misses are read to, and of a piece of the stream, where the cap allows."""
    ring: int = 32 * MIB
    """Bytes that may be read ahead of their use, where the cap allows."""
    lookahead: bool | None = None
    """Whether the predictor is asked for the next layer beforehand, to read what it names while this one computes.
    None: where that was measured to pay (low-rank)."""
    guess: int = 8 * MIB
    """Bytes of one half of the buffer for such reads, where the cap allows."""


@dataclass(frozen=True)
class Cap:
    """What the user allows, in bytes; at most one of the first two. Neither: what the machine can spare.

    `memory` bounds the whole process, `weight_memory` every DRAM byte that holds a weight in any form. `vram` bounds
    the memory of the device, where it has its own; None: what is free there.
    """

    memory: int | None = None
    weight_memory: int | None = None
    vram: int | None = None

    @property
    def asked(self) -> bool:
        """Whether somebody bounded the host's memory."""
        return self.memory is not None or self.weight_memory is not None


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


BOUNCE_BUFFER = 256 * KIB
"""Bytes of host memory that each of kvikio's threads, and the one that asks them, reads through in its compatibility
mode. Nobody measured which size is best."""
LOAD_CHUNK = 128 * KIB
"""Bytes of host memory beside the read buffers through which weights come to a device that keeps them."""
MIN_STAGING = 64 * KIB
"""Smallest half of a read buffer the budget resolver will go down to, alignment aside."""
DEFAULT_NEW_TOKENS = 128
"""Tokens `generate` writes when nobody says."""
