"""The verbs in C++ on the CPU: `flashinfer.native._kernels` on numpy arrays.

Every sum has one fixed order that depends on nothing but the lengths of the operands (`native/table.hpp`), so results
are the same bits for decode and prefill, for any split of a prompt, number of threads and instruction set.
Weights are multiplied straight from their bytes: this backend never holds them in another form. `native_codec` says
how codes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flashinfer.backend.base import PLAIN, Bundle, Bytes, Floats, Index, Mask, Part, Scoring
from flashinfer.backend.bookkeeping import Bookkeeping, Tiers
from flashinfer.backend.bounded import exceeds, may_exceed
from flashinfer.backend.copies import Copies
from flashinfer.backend.footprint import NATIVE
from flashinfer.backend.native_codec import native_codec
from flashinfer.config import KV_CODECS, TILE_NEURONS, TILE_TOKENS, KvType
from flashinfer.native._kernels import Codec as NativeCodec
from flashinfer.native._kernels import Engine
from flashinfer.quant import Codec, codec_named
from flashinfer.store.facts import Activation, UpActivation
from flashinfer.store.geometry import round_up

_WORDS: dict[KvType, type[np.generic]] = {"f32": np.float32, "f16": np.uint16, "int8": np.uint8}
"""What the kernels see of a cache."""
ACTIVATIONS: dict[Activation | UpActivation, int] = {
    "relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "gelu_quick": 5, "fatrelu": 6, "shifted_relu": 7,
    "drelu": 0, "swiglu_oai": 8, "clamped": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """Weights `[rows, cols]` in the bytes they have in the store."""

    raw: Bytes
    codec: str | Codec
    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols


@dataclass(frozen=True)
class Kv:
    """Keys and values `[kv heads, positions, bytes]`, each position's `dims` values in that codec. `bits` are the same
    as the kernels want them: float32, float16 seen as uint16, or rows of bytes."""

    codec: str
    dims: tuple[int, int]
    raw: tuple[Bytes, Bytes]
    bits: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]


class NativeBackend:
    """See `backend.base.Backend`.

    instructions: the instruction set, one of `flashinfer.native._kernels.available()`; the best one where empty.
    """

    def __init__(self, threads: int = 1, instructions: str = "") -> None:
        self._engine = Engine(threads, instructions)
        self.name = f"native-{self._engine.name}"
        self.threads = threads
        self.footprint = NATIVE
        self.together = 1
        self.copies: Copies | None = None

    @property
    def scratch_bytes(self) -> int:
        """Bytes of activations and pointers kept between calls; grows to what the calls so far needed."""
        return self._engine.scratch_bytes

    # -- buffers

    def vector(self, values: Floats) -> Floats:
        return np.array(values, dtype=np.float32, order="C")

    def matrix(self, raw: Bytes, codec: str | Codec, rows: int, cols: int, *, keep: bool) -> Matrix:
        return Matrix(raw, codec, rows, cols)

    def empty(self, tokens: int, width: int) -> Floats:
        return np.empty((tokens, width), dtype=np.float32)

    def zeros(self, tokens: int, width: int) -> Floats:
        return np.zeros((tokens, width), dtype=np.float32)

    def place(self, values: Floats) -> Floats:
        return np.array(values, dtype=np.float32, order="C")

    def take(self, x: Floats, rows: Index) -> Floats:
        return x[rows]

    def put(self, x: Floats, rows: Index, y: Floats) -> None:
        x[rows] = y

    def fetch(self, x: Floats) -> Floats:
        return x.copy()

    def rows(self, weights: Matrix, ids: Index) -> Floats:
        picked = weights.raw.reshape(weights.rows, -1)[ids]
        codec = codec_named(weights.codec) if isinstance(weights.codec, str) else weights.codec
        return codec.decode(picked, weights.cols)

    def close(self) -> None:
        self._engine.close()

    # -- dense parts

    def linear(self, out: Floats, first: int, x: Floats, weights: Matrix) -> None:
        self._engine.linear(out, first, x, weights.raw, native_codec(weights.codec), weights.rows, weights.cols)

    def add(self, x: Floats, y: Floats) -> Floats:
        return np.add(x, y, out=x)

    def multiply(self, x: Floats, y: Floats | float) -> Floats:
        return np.multiply(x, np.float32(y) if isinstance(y, float) else y, out=x)

    def norm(
        self, x: Floats, weight: Floats | None, bias: Floats | None, kind: Literal["rms", "layer"], eps: float,
        size: int | None = None,
    ) -> Floats:  # fmt: skip
        rows = x.reshape(-1, size or x.shape[1])
        out = np.empty_like(rows)
        self._engine.norm(out, rows, weight, bias if kind == "layer" else None, kind == "layer", eps)
        return out.reshape(x.shape)

    def rotate(self, x: Floats, head_dim: int, cos: Floats, sin: Floats, first: int) -> Floats:
        out, rows = np.empty_like(x), slice(first, first + len(x))
        self._engine.rotate(out, x, head_dim, cos[rows], sin[rows])
        return out

    # -- attention

    def share(self, x: Floats, shared: Floats, heads: int) -> Floats:
        before = np.broadcast_to(shared[:, None], (len(x), heads, shared.shape[1]))
        return np.concatenate([before, x.reshape(len(x), heads, -1)], axis=2).reshape(len(x), -1)

    def new_kv(self, kv_heads: int, head_dim: int, capacity: int, dtype: KvType, value_dim: int | None = None) -> Kv:
        # whole tiles: the padding rows of a prompt's last tile may stand for positions beyond the capacity
        codec, dims = KV_CODECS[dtype], (head_dim, value_dim or head_dim)
        positions = round_up(capacity, TILE_TOKENS)
        k, v = (np.zeros((kv_heads, positions, codec_named(codec).row_bytes(dim)), dtype=np.uint8) for dim in dims)
        return Kv(codec, dims, (k, v), (k.view(_WORDS[dtype]), v.view(_WORDS[dtype])))

    def append_kv(self, kv: Kv, at: int, k: Floats, v: Floats, skip: int, count: int) -> None:
        for cache, new in zip(kv.bits, (k, v), strict=True):
            self._engine.append(cache, at, new, skip, count)

    def fetch_kv(self, kv: Kv, count: int) -> tuple[Floats, Floats]:
        def fetched(cache: Bytes, dim: int) -> Floats:
            heads, _, size = cache.shape
            values = codec_named(kv.codec).decode(cache[:, :count].reshape(heads * count, size), dim)
            return values.reshape(heads, count, dim).swapaxes(0, 1).reshape(count, heads * dim)

        return fetched(kv.raw[0], kv.dims[0]), fetched(kv.raw[1], kv.dims[1])

    def attend(self, q: Floats, kv: Kv, first: int, heads: int, scoring: Scoring = PLAIN) -> Floats:
        out, s = np.empty((len(q), heads * kv.dims[1]), dtype=np.float32), scoring
        window = s.window or kv.bits[0].shape[1]
        self._engine.attend(out, q, *kv.bits, first, heads, window, s.softcap or 0.0, s.slopes, s.sinks)
        return out

    # -- feed-forward

    def products(self, gate: Floats, skip: int, count: int) -> Floats:
        seen = gate[skip : skip + count]
        seen.flags.writeable = False
        return seen

    def exceeds(
        self, x: Floats, skip: int, count: int, high: Floats | float, between: tuple[Floats, Floats] | None = None
    ) -> Mask:
        return exceeds(x[skip : skip + count], high, between)

    def may_exceed(
        self, y: Floats, x: Floats, skip: int, count: int, slack: Floats, bias: Floats | None, threshold: float
    ) -> Mask:
        rows = range(skip, skip + count)
        return np.stack([may_exceed(y[i], x[i], slack, bias, threshold) for i in rows])

    def flags(self, mask: Mask) -> Mask:
        return mask

    def marks(self, flags: Mask) -> Mask:
        return flags

    def limit(self, gate: Floats, skip: int, keep: Mask) -> None:
        np.copyto(gate[skip : skip + len(keep)], np.float32(0), where=~keep)

    def decide(self, gate: Floats, x: Floats, index: Index, memory: Bytes, offsets: Index, bundle: Bundle) -> None:
        assert bundle.decision is not None
        parts = (*_place(bundle.decision), *_place(bundle.decision_bias))
        self._engine.decide(gate, x, index, memory, offsets, bundle.bytes, *parts)

    def fire(
        self, gate: Floats, activation: Activation | UpActivation | None, index: Index, threshold: float = 0.0
    ) -> Floats:
        if activation is None:
            picked = gate[:, np.maximum(index, 0)]
            picked[:, index < 0] = 0.0
            return np.ascontiguousarray(picked.swapaxes(0, 1))
        out = np.empty((len(index), len(gate), TILE_NEURONS), dtype=np.float32)
        self._engine.fire(out, gate, ACTIVATIONS[activation], threshold, index)
        return out

    def weigh(self, fired: Floats, weights: Floats) -> None:
        with np.errstate(invalid="ignore"):  # infinity times zero, which is zero here
            np.multiply(fired, weights[:, :, None], out=fired)
        fired[weights == 0] = 0.0

    def bookkeeping(self, tiers: Tiers) -> Bookkeeping | None:
        return None

    def copy(self, memory: Bytes, targets: Index, sources: Index, size: int) -> None:
        self._engine.copy(memory, targets, sources, size)

    def ffn(self, acc: Floats, x: Floats, fired: Floats, memory: Bytes, offsets: Index, bundle: Bundle) -> None:
        parts = (*_place(bundle.up), *_place(bundle.up_bias), *_place(bundle.down))
        of_up = -1 if bundle.up_activation is None else ACTIVATIONS[bundle.up_activation]
        self._engine.ffn(acc, x, fired, memory, offsets, bundle.bytes, *parts, of_up)


def _place(part: Part | None) -> tuple[NativeCodec | None, int]:
    """Codec and byte offset of a part, as the kernels want it."""
    return (None, -1) if part is None else (native_codec(part.codec), part.offset)
