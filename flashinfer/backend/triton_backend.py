"""The torch backend with the feed-forward in Triton's kernels, which a card needs to be busy.

On the CPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests: it is
thousands of times slower.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashinfer.backend.base import Bundle, Index
from flashinfer.backend.copies import Memory
from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.torch_weights import as_tensor
from flashinfer.backend.triton_codes import VECTOR
from flashinfer.backend.triton_ffn import can_run, fused_ffn, probe


class TritonBackend(TorchBackend):
    """See `backend.base.Backend`. Raises DeviceError as `TorchBackend` does."""

    def __init__(self, device: str = "cuda", threads: int = 1) -> None:
        super().__init__(device, threads)
        self.name = f"triton-{device}"

    def ffn(self, acc: Tensor, x: Tensor, fired: Tensor, memory: Memory, offsets: Index, bundle: Bundle) -> None:
        if not can_run(bundle):
            super().ffn(acc, x, fired, memory, offsets, bundle)
            return
        there, x, fired = as_tensor(memory), x.contiguous(), fired.contiguous()
        if there.device == acc.device and _lie_well(there, offsets, bundle):
            fused_ffn(acc, x, fired, there, torch.from_numpy(offsets).to(acc.device), bundle)
            return
        for first in range(0, len(offsets), self.threads):  # as many tiles as there is scratch for
            some = offsets[first : first + self.threads]
            raw = self._together(there, some, bundle.bytes).to(acc.device)
            places = torch.arange(0, raw.numel(), bundle.bytes, device=acc.device).view(some.shape)
            fused_ffn(acc, x, fired[first : first + self.threads], raw, places, bundle)

    def _together(self, memory: Tensor, offsets: Index, size: int) -> Tensor:
        """The bundles one after the other in this thread's scratch, where `memory` is."""
        raw = self._scratch("bundles", offsets.size * size, torch.uint8, memory.device)
        bundles = memory.as_strided((memory.numel() - size + 1, size), (1, 1))
        at = torch.from_numpy(offsets.reshape(-1)).to(memory.device)
        torch.index_select(bundles, 0, at, out=raw.view(-1, size))
        return raw


def _lie_well(memory: Tensor, offsets: Index, bundle: Bundle) -> bool:
    """Whether bundles are where the kernels of such bundles can read them."""
    unit = np.gcd(VECTOR, bundle.bytes)
    return memory.data_ptr() % VECTOR == 0 and not np.bitwise_or.reduce(offsets, axis=None) % unit


def why_not(device: str) -> str | None:
    """Why Triton's kernels do not run on that device of torch's; None where they do. Compiles them."""
    try:
        probe(torch.device(device))
    except Exception as e:  # no compiler, a card too old, a broken installation: whatever it raises is the reason
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    return None
