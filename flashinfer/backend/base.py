"""The verbs of a compute backend.

Activations are float32 `[tokens, width]` buffers that only the backend looks into; weights stay in the
bytes and the codec they have in the store. All arithmetic runs on tiles whose shapes are constants of
`config.py`, so that *when* and *from where* a tile's bytes arrive cannot change a result: not the cap,
the cache, the order on disk, the prompt's chunking or the number of threads.

A token axis is either 1 (decode) or a multiple of TILE_TOKENS whose tiles are anchored to absolute
positions (prefill), or some of such rows (`Backend.together`); `model.rows` makes it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.backend.copies import Copies
from flashinfer.backend.footprint import Footprint
from flashinfer.config import KvType
from flashinfer.quant import Codec
from flashinfer.store.facts import Activation, UpActivation

if TYPE_CHECKING:
    from flashinfer.backend.bookkeeping import Bookkeeping, Tiers

Buffer = Any
"""Opaque outside its backend."""
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Numbers = Index | Any
"""On the host, or where arithmetic is, as `Bookkeeping` makes them."""
Mask = npt.NDArray[np.bool_]
Flags = Any
"""Bools `[tokens, width]` where arithmetic is; opaque outside its backend."""


@dataclass(frozen=True)
class Part:
    """Where one part lies in a bundle: byte offset, values, and the codec, as `Backend.matrix` has it."""

    offset: int
    elements: int
    codec: str | Codec


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds. Plain FFNs have no `up` here: it is their decision matrix. `decision` and its bias are
    there where the store keeps the decision matrix in its bundles. `up_activation`: what becomes of products with `up`;
    None: they count as they are."""

    bytes: int
    down: Part
    up: Part | None = None
    up_bias: Part | None = None
    decision: Part | None = None
    decision_bias: Part | None = None
    up_activation: UpActivation | None = None


@dataclass(frozen=True, eq=False)
class Scoring:
    """What becomes of scores, the scaled products of queries and keys, before their softmax, in this order.

    softcap: s becomes `softcap * tanh(s / softcap)` (Gemma 2, arXiv 2408.00118, section 2). slopes: float32 `[heads]`,
    by which a score falls for each position between its key and its query (ALiBi, arXiv 2108.12409, section 3).
    window: a query sees so many positions, its own the last of them (Longformer, arXiv 2004.05150, section 3.1); None:
    all. sinks: float32 `[heads]`, a score that counts in the softmax and has no value (gpt-oss, arXiv 2508.10925,
    section 2.2).
    """

    softcap: float | None = None
    slopes: Floats | None = None
    window: int | None = None
    sinks: Floats | None = None


PLAIN = Scoring()
"""The scores as they are."""


class Backend(Protocol):
    """Where arithmetic runs. A call returns when its result may be used by the next one."""

    name: str
    threads: int
    footprint: Footprint
    together: int
    """Of a prompt's rows, so many from a multiple of it on are taken out together, or none of them: 1 where a row's
    bits do not depend on its place among others."""
    copies: Copies | None
    """Where the device has memory of its own: how bytes come there. Verbs take such memory wherever they take Bytes."""

    def vector(self, values: Floats) -> Buffer:
        """A resident float32 vector or table, copied."""
        ...

    def matrix(self, raw: Bytes, codec: str | Codec, rows: int, cols: int, *, keep: bool) -> Buffer:
        """Weights `[rows, cols]` over raw bytes. On a CPU this is a view. `codec`: its name in the manifest, or the
        codec itself where a name does not say all (`LlmInt8`). `keep`: it stays for good (a device with its own
        memory copies it there and the caller may drop `raw`); otherwise it is used at once."""
        ...

    def empty(self, tokens: int, width: int) -> Buffer:
        """A float32 activation that is written to before anybody looks: whatever it holds."""
        ...

    def zeros(self, tokens: int, width: int) -> Buffer:
        """A float32 activation of zeros."""
        ...

    def place(self, values: Floats) -> Buffer:
        """Host float32 `[tokens, width]` as an activation, copied."""
        ...

    def take(self, x: Buffer, rows: Index) -> Buffer:
        """These rows as an activation of as many tokens, copied."""
        ...

    def put(self, x: Buffer, rows: Index, y: Buffer) -> None:
        """These rows, each at most once, become those of `y`. Writes `x`."""
        ...

    def fetch(self, x: Buffer) -> Floats:
        """An activation on the host, copied."""
        ...

    def rows(self, weights: Buffer, ids: Index) -> Floats:
        """Rows of a weight matrix as float32 `[len(ids), cols]` on the host (embedding lookup)."""
        ...

    def linear(self, out: Buffer, first: int, x: Buffer, weights: Buffer) -> None:
        """`out[:, first : first + rows] = x @ weights.T`, TILE_ROWS output rows at a time. Writes `out`."""
        ...

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """`x + y`, `y` an activation or a vector. Overwrites and returns `x`."""
        ...

    def multiply(self, x: Buffer, y: Buffer | float) -> Buffer:
        """`x * y`, `y` a vector, a number or a buffer of the shape of `x`. Overwrites and returns `x`."""
        ...

    def norm(
        self, x: Buffer, weight: Buffer | None, bias: Buffer | None, kind: Literal["rms", "layer"], eps: float,
        size: int | None = None,
    ) -> Buffer:  # fmt: skip
        """RMSNorm or LayerNorm over every `size` values of a row (None: over the row); so long are weight and bias."""
        ...

    def rotate(self, x: Buffer, head_dim: int, cos: Buffer, sin: Buffer, first: int) -> Buffer:
        """Rotary positions first, first+1, ... on `[tokens, heads * head_dim]`, halves convention; cos, sin: resident
        tables `[positions, rotary_dim / 2]`."""
        ...

    def share(self, x: Buffer, shared: Buffer, heads: int) -> Buffer:
        """Each of the heads of `x` `[tokens, heads * n]` with what they share `[tokens, m]` before it: `[tokens,
        heads * (m + n)]`."""
        ...

    def new_kv(
        self, kv_heads: int, head_dim: int, capacity: int, dtype: KvType, value_dim: int | None = None
    ) -> Buffer:
        """Keys and values of one layer for `capacity` positions, zeroed, kept in `dtype`. `value_dim` is of a head's
        values, None where that is `head_dim`."""
        ...

    def append_kv(self, kv: Buffer, at: int, k: Buffer, v: Buffer, skip: int, count: int) -> None:
        """Positions at .. at+count of `kv` become rows skip .. skip+count of k and v, rounded to its type (to
        nearest, ties to even). Writes `kv`."""
        ...

    def fetch_kv(self, kv: Buffer, count: int) -> tuple[Floats, Floats]:
        """The first `count` positions on the host: keys `[count, kv_heads * head_dim]`, and values, in float32."""
        ...

    def attend(self, q: Buffer, kv: Buffer, first: int, heads: int, scoring: Scoring = PLAIN) -> Buffer:
        """Causal attention of rows at positions first, first+1, ... over `kv`, grouped-query where there are
        fewer kv heads: `[tokens, heads * value_dim]`. Softmax over key tiles of TILE_KEYS with a fixed order of sums.
        Keys beyond the window of all of a tile's rows are not looked at."""
        ...

    def products(self, gate: Buffer, skip: int, count: int) -> Floats:
        """Decision products `[count, neurons]` of rows skip .. skip+count on the host, read-only: on a CPU a view,
        which later writes to `gate` change."""
        ...

    def exceeds(
        self, x: Buffer, skip: int, count: int, high: Buffer | float, between: tuple[Buffer, Buffer] | None = None
    ) -> Flags:
        """Which values of rows skip .. skip+count are above `high`, or above the first and below the second of
        `between`: a float32 number for all, vectors for each column. What is not a number is not."""
        ...

    def may_exceed(
        self, y: Buffer, x: Buffer, skip: int, count: int, slack: Buffer, bias: Buffer | None, threshold: float
    ) -> Flags:
        """Which values of `y + bias`, of rows skip .. skip+count, may be above `threshold` where they are wrong by no
        more than `slack * |x|`: `backend.bounded` has the rule. `slack` and `bias` are vectors."""
        ...

    def flags(self, mask: Mask) -> Flags:
        """Host bools `[tokens, width]` where arithmetic is."""
        ...

    def marks(self, flags: Flags) -> Mask:
        """Flags on the host, read-only."""
        ...

    def decide(self, gate: Buffer, x: Buffer, index: Numbers, memory: Bytes, offsets: Numbers, bundle: Bundle) -> None:
        """`gate[:, index[t, n]] += x @ row + bias` for the decision rows in the bundles, the right side with the bits
        that `linear` and `add` give on the whole matrix. `index` int64 `[tiles, TILE_NEURONS]`, each neuron at most
        once, -1: nothing; `memory`, `offsets`: see `ffn`. Writes `gate`; what is not named stays."""
        ...

    def limit(self, gate: Buffer, skip: int, keep: Flags) -> None:
        """`gate[skip + i, ~keep[i]] = 0` for `keep` `[count, neurons]`; other rows stay. Writes `gate`."""
        ...

    def fire(
        self, gate: Buffer, activation: Activation | UpActivation | None, index: Numbers, threshold: float = 0.0
    ) -> Buffer:
        """Activated decision products in tiles (None: as they are): `index` int64 `[tiles, TILE_NEURONS]`, -1 pads with
        zero. `threshold`: of the activations that have one. Result `[tiles, tokens, TILE_NEURONS]`."""
        ...

    def weigh(self, fired: Buffer, weights: Floats) -> None:
        """`fired[t, i] *= weights[t, i]` for host float32 `weights` `[tiles, tokens]`; zero makes zero, whatever it
        meets. Writes `fired`."""
        ...

    def ffn(self, acc: Buffer, x: Buffer, fired: Buffer, memory: Bytes, offsets: Numbers, bundle: Bundle) -> None:
        """Add the neurons' outputs to `acc`, tile by tile in order. `memory` holds the bundles, the bundle
        of `fired[t, :, n]` at byte `offsets[t, n]` (`[tiles, TILE_NEURONS]`). Writes `acc`."""
        ...

    def bookkeeping(self, tiers: Tiers) -> Bookkeeping | None:
        """Slots of a layer that are kept where arithmetic is; None where the host keeps them better."""
        ...

    def copy(self, memory: Bytes, targets: Index, sources: Index, size: int) -> None:
        """Copy the `size` bytes of `memory` from each source to its target; none of these ranges overlaps another.
        Takes no memory of its own. Writes `memory`."""
        ...

    def close(self) -> None:
        """Release threads. Idempotent."""
        ...
