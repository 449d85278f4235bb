"""Many small copies as one launch: records between slots, wherever they lie, also in pinned memory of the host.

A program reads part of a record and writes it to its place, through the bus where one of them is the host's. So a step
that exchanges hundreds of records takes one launch, where a transfer each would take as many calls of the driver.

Compiled for sm_90, and run in Triton's interpreter, never yet on a card: whether a card reads the host's memory as fast
so as its copy engines do, nobody has measured.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.base import Index
from flashinfer.backend.torch_weights import there
from flashinfer.backend.triton_codes import VECTOR

WORDS = 2048
"""Words of 8 bytes that a program copies."""
WORD = 8


def can_copy(target: Tensor, source: Tensor, targets: Index, sources: Index, size: int) -> bool:
    """Whether all of it begins and ends where loads of 16 bytes may."""
    places = int(np.bitwise_or.reduce(targets | sources, initial=0))
    ends = target.numel() | source.numel() | target.data_ptr() | source.data_ptr()
    return not (places | size | ends) % VECTOR


def fused_copy(target: Tensor, targets: Index, source: Tensor, sources: Index, size: int, device: torch.device) -> None:
    """`size` bytes from each of the sources to each of the targets, on the device's current stream. Memories are uint8,
    of the device or pinned. Before: `can_copy`, and what `Copies` says of overlaps. Writes `target`."""
    if not len(targets) or not size:
        return
    places = there(np.stack([targets, sources]) // WORD, device)
    words = size // WORD
    with torch.cuda.device_of(places):
        _copy_kernel[(len(targets), triton.cdiv(words, WORDS))](
            target.view(torch.int64), source.view(torch.int64), places, len(targets), words, WORDS
        )


def probe(device: torch.device) -> None:
    """Copy from pinned memory of the host to the device and back. Raises as `triton_ffn.probe` does."""
    there = torch.zeros(64, dtype=torch.uint8, device=device)
    host = torch.arange(64, dtype=torch.uint8, pin_memory=device.type == "cuda")
    first, last = np.array([0, 32]), np.array([48, 16])
    fused_copy(there, last, host, first, 16, device)
    back = torch.zeros(64, dtype=torch.uint8, pin_memory=device.type == "cuda")
    fused_copy(back, first, there, last, 16, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if back.tolist() != [*range(16), *[0] * 16, *range(32, 48), *[0] * 16]:
        raise RuntimeError("a record that is copied is wrong")


@triton.jit(do_not_specialize=["count", "words"])
def _copy_kernel(target, source, places, count, words, WORDS: tl.constexpr):
    """Part of one record; `places` are all targets, then all sources, in words. Writes `target`."""
    record, word = tl.program_id(0), tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    to = tl.multiple_of(tl.load(places + record), 2)
    at = tl.multiple_of(tl.load(places + count + record), 2)
    pairs = tl.max_constancy(word < words, 2)  # words are even: loads may take two
    tl.store(target + to + word, tl.load(source + at + word, mask=pairs), mask=pairs)
