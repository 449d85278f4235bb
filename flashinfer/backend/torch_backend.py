"""The verbs in torch, on the CPU or (by the same code) on CUDA.

Weights are converted tile by tile into float32 scratch that belongs to the thread; no matrix is ever
converted whole. Torch itself runs single-threaded: parallelism is over tiles, so thread count cannot
change a tile's arithmetic. The caller's thread takes its share of the tiles, so that scratch times `threads` is
all the memory it takes (`memory.py` counts on both).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer.backend.base import PLAIN, Bundle, Bytes, Floats, Index, Mask, Numbers, Part, Scoring
from flashinfer.backend.bookkeeping import Bookkeeping, Tiers
from flashinfer.backend.bounded import OVERFLOW, UNDERFLOW, WIDER
from flashinfer.backend.copies import Copies, Memory
from flashinfer.backend.footprint import TORCH
from flashinfer.backend.torch_copies import CudaCopies
from flashinfer.backend.torch_cuda import open_card
from flashinfer.backend.torch_graphs import Graphs
from flashinfer.backend.torch_tiers import TensorTiers
from flashinfer.backend.torch_tiles import Kv, activated, attend_tile, times
from flashinfer.backend.torch_weights import Matrix, as_tensor, here, row_bytes, there, unpack
from flashinfer.config import KV_CODECS, TILE_KEYS, TILE_NEURONS, TILE_ROWS, TILE_TOKENS, KvType
from flashinfer.quant import Codec
from flashinfer.store.facts import Activation, UpActivation

PARALLEL_WORK = 1 << 19
"""Multiply-adds below which starting a second thread costs more than it saves."""


class TorchBackend:
    """See `backend.base.Backend`. Raises DeviceError when the device is not there."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        self._device = torch.device("cpu") if device == "cpu" else open_card(device)
        self.name = f"torch-{device}"
        self.footprint = TORCH
        self.together = TILE_TOKENS
        self.threads = threads
        self._graphs = Graphs(self._device)
        self.copies: Copies | None = None if device == "cpu" else CudaCopies(self._device)
        self._pool = None
        if threads > 1:
            # torch counts threads per thread, and a new one starts with all cores
            self._pool = ThreadPoolExecutor(threads - 1, "flashinfer-compute", torch.set_num_threads, (1,))
        self._local = threading.local()
        torch.set_num_threads(1)

    # -- buffers

    def vector(self, values: Floats) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def matrix(self, raw: Memory, codec: str | Codec, rows: int, cols: int, *, keep: bool) -> Matrix:
        return Matrix(as_tensor(raw).view(rows, -1).to(self._device), codec, cols)

    def empty(self, tokens: int, width: int) -> Tensor:
        return torch.empty(tokens, width, device=self._device)

    def zeros(self, tokens: int, width: int) -> Tensor:
        return torch.zeros(tokens, width, device=self._device)

    def place(self, values: Floats) -> Tensor:
        return torch.tensor(values, device=self._device)

    def take(self, x: Tensor, rows: Index) -> Tensor:
        return x[there(rows, self._device)]

    def put(self, x: Tensor, rows: Index, y: Tensor) -> None:
        x[there(rows, self._device)] = y

    def fetch(self, x: Tensor) -> Floats:
        host: Floats = x.cpu().numpy().copy()
        return host

    def rows(self, weights: Matrix, ids: Index) -> Floats:
        picked = weights.raw[there(ids, self._device)]
        values = torch.empty(len(ids), weights.cols, device=self._device)
        host: Floats = unpack(picked, weights.codec, values).cpu().numpy()
        return host

    def close(self) -> None:
        if self.copies is not None:
            self.copies.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _scratch(
        self, name: str, elements: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """This thread's scratch of that name, grown when needed; on a device the host has its own."""
        where = device or self._device
        name = name if where == self._device else f"{name} of the host"
        kept: Tensor | None = getattr(self._local, name, None)
        if kept is None or kept.numel() < elements:
            kept = None
            setattr(self._local, name, None)  # the old one goes before the new one comes
            kept = torch.zeros(elements, dtype=dtype, device=where)
            setattr(self._local, name, kept)
        return kept[:elements]

    def _spread(self, count: int, work: int, run: Callable[[int], None]) -> None:
        """`run(i)` for every tile, on all threads when there is enough work."""
        if self._pool is None or work < PARALLEL_WORK or count < 2:
            for i in range(count):
                run(i)
            return
        share = -(-count // self.threads)

        def run_share(k: int) -> None:
            for i in range(k * share, min(count, (k + 1) * share)):
                run(i)

        others = [self._pool.submit(run_share, k) for k in range(1, -(-count // share))]
        run_share(0)
        for other in others:
            other.result()

    # -- dense parts

    def linear(self, out: Tensor, first: int, x: Tensor, weights: Matrix) -> None:
        rows, cols = weights.shape
        tokens = x.shape[0]

        def tile(i: int) -> None:
            a, b = i * TILE_ROWS, min(rows, (i + 1) * TILE_ROWS)
            w = self._scratch("values", TILE_ROWS * cols)[: (b - a) * cols].view(b - a, cols)
            unpack(weights.raw[a:b], weights.codec, w)
            for t, products in times(x, w):
                out[t : t + len(products), first + a : first + b] = products

        self._spread(-(-rows // TILE_ROWS), rows * cols * tokens, tile)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)

    def multiply(self, x: Tensor, y: Tensor | float) -> Tensor:
        return x.mul_(y)

    def norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Literal["rms", "layer"], eps: float,
        size: int | None = None,
    ) -> Tensor:  # fmt: skip
        rows = x.view(-1, size or x.shape[1])
        if kind == "layer":
            return F.layer_norm(rows, (rows.shape[1],), weight, bias, eps).view(x.shape)
        y = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
        return (y if weight is None else y.mul_(weight)).view(x.shape)

    def rotate(self, x: Tensor, head_dim: int, cos: Tensor, sin: Tensor, first: int) -> Tensor:
        half = cos.shape[1]
        heads = x.view(x.shape[0], -1, head_dim)
        c, s = (table[first : first + len(x), None, :] for table in (cos, sin))
        a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1).view(x.shape)

    # -- attention

    def share(self, x: Tensor, shared: Tensor, heads: int) -> Tensor:
        before = shared[:, None].expand(-1, heads, -1)
        return torch.cat((before, x.view(len(x), heads, -1)), dim=2).view(len(x), -1)

    def new_kv(self, kv_heads: int, head_dim: int, capacity: int, dtype: KvType, value_dim: int | None = None) -> Kv:
        codec, dims = KV_CODECS[dtype], (head_dim, value_dim or head_dim)
        tiles = (-(-capacity // TILE_KEYS), kv_heads, TILE_KEYS)
        k, v = (torch.zeros(*tiles, row_bytes(codec, d), dtype=torch.uint8, device=self._device) for d in dims)
        return Kv(k, v, codec, dims)

    def append_kv(self, kv: Kv, at: int, k: Tensor, v: Tensor, skip: int, count: int) -> None:
        heads = kv.k.shape[1]
        at_tile = torch.arange(at, at + count, device=self._device)
        where = (at_tile // TILE_KEYS, slice(None), at_tile % TILE_KEYS)
        for kept, new, dim in zip((kv.k, kv.v), (k, v), kv.dims, strict=True):
            kept[where] = kv.encoded(new[skip : skip + count].view(count, heads, dim))

    def fetch_kv(self, kv: Kv, count: int) -> tuple[Floats, Floats]:
        tiles = -(-count // TILE_KEYS)

        def fetched(values: Tensor) -> Floats:
            host: Floats = values.permute(0, 2, 1, 3).flatten(0, 1)[:count].flatten(1).cpu().numpy()
            return host

        return fetched(kv.keys(0, tiles)), fetched(kv.values(0, tiles))

    def attend(self, q: Tensor, kv: Kv, first: int, heads: int, scoring: Scoring = PLAIN) -> Tensor:
        out = torch.empty(len(q), heads * kv.dims[1], device=self._device)
        step = 1 if q.shape[0] == 1 else TILE_TOKENS
        for t in range(0, q.shape[0], step):
            out[t : t + step] = attend_tile(q[t : t + step], kv, first + t, heads, scoring)
        return out

    # -- feed-forward

    def products(self, gate: Tensor, skip: int, count: int) -> Floats:
        host: Floats = gate[skip : skip + count].cpu().numpy()
        host.flags.writeable = False
        return host

    def decide(self, gate: Tensor, x: Tensor, index: Numbers, memory: Memory, offsets: Numbers, bundle: Bundle) -> None:
        named, at = (here(a).reshape(-1) for a in (index, offsets))
        order = np.argsort(named, kind="stable")
        order = order[named[order] >= 0]
        tiles = named[order] // TILE_ROWS
        groups = np.split(order, np.flatnonzero(np.diff(tiles)) + 1) if len(order) else []
        raw = as_tensor(memory)

        def tile(i: int) -> None:
            self._decide_tile(gate, x, named[groups[i]], at[groups[i]], raw, bundle)

        self._spread(len(groups), TILE_ROWS * x.numel(), tile)

    def _decide_tile(self, gate: Tensor, x: Tensor, rows: Index, at: Index, memory: Tensor, bundle: Bundle) -> None:
        """Some rows of one tile of the decision matrix, the others zero: the shapes `linear` has on all of it."""
        part, width = bundle.decision, x.shape[1]
        assert part is not None
        first = int(rows[0]) // TILE_ROWS * TILE_ROWS
        w = self._scratch("values", TILE_ROWS * width)[: min(TILE_ROWS, gate.shape[1] - first) * width].view(-1, width)
        for start in range(0, len(w), TILE_NEURONS):  # so many bundles fit the scratch
            some = w[start : start + TILE_NEURONS]
            here = (rows - first >= start) & (rows - first < start + len(some))
            where, missing = np.full(len(some), at[0]), np.ones(len(some), dtype=bool)
            where[rows[here] - first - start], missing[rows[here] - first - start] = at[here], False
            unpack(self._gathered(memory, where, part), part.codec, some)
            some.masked_fill_(there(missing, self._device)[:, None], 0.0)
        bias = None
        if bundle.decision_bias is not None:
            found = self._gathered(memory, at, bundle.decision_bias)
            bias = unpack(found, bundle.decision_bias.codec, torch.empty(len(rows), 1, device=self._device))[:, 0]
        columns = there(rows, self._device)
        for t, products in times(x, w):
            chosen = products[:, columns - first]
            gate[t : t + len(products), columns] += chosen if bias is None else chosen + bias

    def _gathered(self, memory: Tensor, at: Index, part: Part) -> Tensor:
        """One part of the bundles at those bytes: uint8 `[len(at), bytes]` in this thread's scratch."""
        size = row_bytes(part.codec, part.elements)
        raw = self._scratch("bundles", len(at) * size, torch.uint8, memory.device).view(len(at), size)
        places = memory.as_strided((memory.numel() - size + 1, size), (1, 1))
        return torch.index_select(places, 0, torch.from_numpy(at + part.offset).to(memory.device), out=raw)

    def exceeds(
        self, x: Tensor, skip: int, count: int, high: Tensor | float, between: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        seen = x[skip : skip + count]
        above = seen > high
        return above if between is None else above | ((seen > between[0]) & (seen < between[1]))

    def may_exceed(
        self, y: Tensor, x: Tensor, skip: int, count: int, slack: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        rows = slice(skip, skip + count)
        norm = x[rows].double().square().sum(dim=1, keepdim=True).sqrt() * WIDER
        wide = slack.double() * (norm * WIDER)
        wide = torch.where(slack > 0, wide + UNDERFLOW, wide)
        top = wide + y[rows]
        top = top if bias is None else top + bias
        return ~(top <= float(np.float32(threshold))) | (wide >= OVERFLOW)

    def flags(self, mask: Mask) -> Tensor:
        return torch.tensor(mask, device=self._device)

    def marks(self, flags: Tensor) -> Mask:
        host: Mask = flags.cpu().numpy()
        return host

    def limit(self, gate: Tensor, skip: int, keep: Tensor) -> None:
        gate[skip : skip + len(keep)].masked_fill_(~keep, 0.0)

    def fire(
        self, gate: Tensor, activation: Activation | UpActivation | None, index: Numbers, threshold: float = 0.0
    ) -> Tensor:
        at = there(index, self._device)
        picked = gate[:, at.clamp(min=0)].permute(1, 0, 2).contiguous()
        active = picked if activation is None else activated(picked, activation, threshold)
        return active.masked_fill_((at < 0)[:, None, :], 0.0)

    def weigh(self, fired: Tensor, weights: Floats) -> None:
        factors = there(weights, self._device)[:, :, None]
        fired.mul_(factors).masked_fill_(factors == 0, 0.0)

    def bookkeeping(self, tiers: Tiers) -> Bookkeeping | None:
        return None if self.copies is None else TensorTiers(tiers, self._device, self._graphs)

    def copy(self, memory: Bytes, targets: Index, sources: Index, size: int) -> None:
        for to, at in zip(targets.tolist(), sources.tolist(), strict=True):
            memory[to : to + size] = memory[at : at + size]

    def ffn(self, acc: Tensor, x: Tensor, fired: Tensor, memory: Memory, offsets: Numbers, bundle: Bundle) -> None:
        raw = as_tensor(memory)
        at = there(offsets, raw.device)
        bundles = raw.as_strided((raw.numel() - bundle.bytes + 1, bundle.bytes), (1, 1))
        wave = self.threads if self._pool is not None else 1
        work = TILE_NEURONS * bundle.bytes * len(acc) * wave
        for start in range(0, len(offsets), wave):
            count = min(wave, len(offsets) - start)
            parts: list[Tensor] = [acc] * count

            def tile(i: int, start: int = start, parts: list[Tensor] = parts) -> None:
                parts[i] = self._ffn_tile(x, fired[start + i], bundles, at[start + i], bundle)

            self._spread(count, work, tile)
            for part in parts:
                acc.add_(part)

    def _ffn_tile(self, x: Tensor, fired: Tensor, bundles: Tensor, at: Tensor, bundle: Bundle) -> Tensor:
        """Output of one tile of neurons, `[tokens, hidden]`."""
        raw = self._scratch("bundles", TILE_NEURONS * bundle.bytes, torch.uint8, bundles.device)
        raw = raw.view(TILE_NEURONS, bundle.bytes)
        raw = torch.index_select(bundles, 0, at, out=raw).to(self._device)
        sizes = [0 if p is None else TILE_NEURONS * p.elements for p in (bundle.down, bundle.up, bundle.up_bias)]
        places = torch.split(self._scratch("values", sum(sizes)), sizes)
        down = _converted(raw, bundle.down, places[0])
        up = None if bundle.up is None else _converted(raw, bundle.up, places[1])
        bias = None if bundle.up_bias is None else _converted(raw, bundle.up_bias, places[2])[:, 0]
        step = 1 if x.shape[0] == 1 else TILE_TOKENS
        out = []
        for t in range(0, x.shape[0], step):
            h = fired[t : t + step]
            if up is not None:
                u = torch.mm(x[t : t + step], up.t())
                u = u if bias is None else u + bias
                h = h * (u if bundle.up_activation is None else activated(u, bundle.up_activation))
            out.append(torch.mm(h, down))
        return out[0] if len(out) == 1 else torch.cat(out)


def _converted(raw: Tensor, part: Part, values: Tensor) -> Tensor:
    """One part of a tile of bundles as float32 `[TILE_NEURONS, elements]`. Writes `values`."""
    data = raw[:, part.offset : part.offset + row_bytes(part.codec, part.elements)]
    return unpack(data, part.codec, values.view(TILE_NEURONS, part.elements))
