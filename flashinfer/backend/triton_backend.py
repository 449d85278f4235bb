"""The torch backend with its larger verbs in Triton's kernels: a launch or two where torch has up to thousands.

On the CPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests: it is
thousands of times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashinfer.backend import triton_attend, triton_copies, triton_ffn, triton_linear, triton_vectors
from flashinfer.backend.base import PLAIN, Bundle, Index, Numbers, Scoring
from flashinfer.backend.copies import Memory
from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.torch_copies import CudaCopies
from flashinfer.backend.torch_tiles import Kv
from flashinfer.backend.torch_weights import Matrix, as_tensor, here, there
from flashinfer.backend.triton_attend import fused_attend
from flashinfer.backend.triton_codes import VECTOR, knows
from flashinfer.backend.triton_copies import can_copy, fused_copy
from flashinfer.backend.triton_ffn import can_run, fused_ffn
from flashinfer.backend.triton_linear import fused_decide, fused_linear
from flashinfer.backend.triton_vectors import can_append, fused_append, fused_norm, fused_rotate
from flashinfer.config import TILE_ROWS


class TritonBackend(TorchBackend):
    """See `backend.base.Backend`. Raises DeviceError as `TorchBackend` does."""

    def __init__(self, device: str = "cuda", threads: int = 1) -> None:
        super().__init__(device, threads)
        self.name = f"triton-{device}"
        if isinstance(self.copies, CudaCopies) and not _why(triton_copies, self._device):
            self.copies.many = fused_copy, can_copy

    def linear(self, out: Tensor, first: int, x: Tensor, weights: Matrix) -> None:
        if not knows(weights.codec):
            super().linear(out, first, x, weights)
            return
        x = x.contiguous()
        if weights.raw.data_ptr() % VECTOR == 0:
            fused_linear(out, first, x, weights)
            return
        size = weights.raw.shape[1]
        for row in range(0, len(weights.raw), TILE_ROWS):
            some = weights.raw[row : row + TILE_ROWS]
            moved = self._scratch("values", len(some) * -(-size // 4)).view(torch.uint8)[: some.numel()].view_as(some)
            fused_linear(out, first + row, x, Matrix(moved.copy_(some), weights.codec, weights.cols))

    def norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Literal["rms", "layer"], eps: float,
        size: int | None = None,
    ) -> Tensor:  # fmt: skip
        return fused_norm(x.contiguous(), weight, bias, kind, eps, size or x.shape[1])

    def rotate(self, x: Tensor, head_dim: int, cos: Tensor, sin: Tensor, first: int) -> Tensor:
        return fused_rotate(x.contiguous(), head_dim, cos, sin, first)

    def append_kv(self, kv: Kv, at: int, k: Tensor, v: Tensor, skip: int, count: int) -> None:
        if not can_append(kv):
            super().append_kv(kv, at, k, v, skip, count)
            return
        fused_append(kv, at, k.contiguous(), v.contiguous(), skip, count)

    def attend(self, q: Tensor, kv: Kv, first: int, heads: int, scoring: Scoring = PLAIN) -> Tensor:
        return fused_attend(q.contiguous(), kv, first, heads, scoring)

    def decide(self, gate: Tensor, x: Tensor, index: Numbers, memory: Memory, offsets: Numbers, bundle: Bundle) -> None:
        if bundle.decision is None or not knows(bundle.decision.codec):
            super().decide(gate, x, index, memory, offsets, bundle)
            return
        named, x = there(index, gate.device).contiguous(), x.contiguous()
        for some, raw, places in self._placed(memory, offsets, bundle, gate.device):
            fused_decide(gate, x, named[some], raw, places, bundle)

    def ffn(self, acc: Tensor, x: Tensor, fired: Tensor, memory: Memory, offsets: Numbers, bundle: Bundle) -> None:
        if not can_run(bundle):
            super().ffn(acc, x, fired, memory, offsets, bundle)
            return
        x, fired = x.contiguous(), fired.contiguous()
        for some, raw, places in self._placed(memory, offsets, bundle, acc.device):
            fused_ffn(acc, x, fired[some], raw, places, bundle)

    def _placed(
        self, memory: Memory, offsets: Numbers, bundle: Bundle, device: torch.device
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tiles of bundles where the kernels can read them: which tiles, memory of the device, and offsets in it."""
        raw = as_tensor(memory)
        if raw.device == device and _lie_well(raw, offsets, bundle):
            yield slice(None), raw, there(offsets, device).contiguous()
            return
        at = here(offsets)
        for first in range(0, len(at), self.threads):  # as many tiles as there is scratch for
            some = at[first : first + self.threads]
            gathered = self._together(raw, some, bundle.bytes).to(device)
            places = torch.arange(0, gathered.numel(), bundle.bytes, device=device).view(some.shape)
            yield slice(first, first + self.threads), gathered, places

    def _together(self, memory: Tensor, offsets: Index, size: int) -> Tensor:
        """The bundles one after the other in this thread's scratch, where `memory` is."""
        raw = self._scratch("bundles", offsets.size * size, torch.uint8, memory.device)
        bundles = memory.as_strided((memory.numel() - size + 1, size), (1, 1))
        at = torch.from_numpy(offsets.reshape(-1)).to(memory.device)
        torch.index_select(bundles, 0, at, out=raw.view(-1, size))
        return raw


def _lie_well(memory: Tensor, offsets: Numbers, bundle: Bundle) -> bool:
    """Whether bundles are where the kernels of such bundles can read them, as they are in slots, which offsets on the
    device are of: nobody waits to look at those."""
    unit = np.gcd(VECTOR, bundle.bytes)
    known = isinstance(offsets, Tensor) or not np.bitwise_or.reduce(offsets, axis=None) % unit
    return memory.data_ptr() % VECTOR == 0 and known


def why_not(device: str) -> str | None:
    """Why Triton's kernels do not run on that device of torch's; None where they do. Compiles them."""
    kernels = (triton_vectors, triton_linear, triton_attend, triton_ffn)
    return next(filter(None, (_why(some, torch.device(device)) for some in kernels)), None)


def _why(kernels: Any, device: torch.device) -> str | None:
    try:
        kernels.probe(device)
    except Exception as e:  # no compiler, a card too old, a broken installation: whatever it raises is the reason
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    return None
