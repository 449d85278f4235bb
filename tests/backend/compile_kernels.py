"""Compile every kernel for a card that is not here: `python -m tests.backend.compile_kernels CAPABILITY CODEC`.

Calls go through Triton's own launch. One line for each: the kernel's name, the hash of what was compiled, and whether a
thread loads 16 bytes at once.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flashinfer.backend.base import Bundle, Part, Scoring
from flashinfer.backend.torch_tiles import Kv
from flashinfer.backend.torch_weights import Matrix
from flashinfer.backend.triton_attend import fused_attend
from flashinfer.backend.triton_copies import fused_copy
from flashinfer.backend.triton_ffn import fused_ffn
from flashinfer.backend.triton_linear import fused_decide, fused_linear
from flashinfer.backend.triton_vectors import fused_append, fused_norm, fused_rotate
from flashinfer.quant import codec_named

WIDTH = 4096


class Driver:
    """As much of a card as compiling for it takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", int(sys.argv[1]), 32)


def compiled(self: Any, *arguments: Any, run: Any = JITFunction.run, **options: Any) -> None:
    kernel = run(self, *arguments, **options | {"warmup": True})
    print(self.__name__, kernel.hash, "ld.global.v4.b32" in kernel.asm["ptx"])


PLACES = np.arange(0, 160, 16)


def bundle_of(codec: str) -> Bundle:
    size = codec_named(codec).row_bytes(WIDTH)
    parts = [Part(i * size, WIDTH, codec) for i in range(3)]
    bias = Part(3 * size, 1, "f32")
    return Bundle(3 * size + 16, parts[0], parts[1], bias, parts[2], bias, up_activation="clamped")


def main(codec: str) -> None:
    bundle = bundle_of(codec)
    memory = torch.zeros(bundle.bytes, dtype=torch.uint8)
    for tokens, tiles in ((1, 1), (1, 7), (16, 1), (48, 3)):
        x, named = torch.zeros(tokens, WIDTH), torch.zeros(tiles, 64, dtype=torch.int64)
        raw = torch.zeros(tiles * 64, codec_named(codec).row_bytes(WIDTH), dtype=torch.uint8)
        gate = torch.zeros(tokens, 64 * tiles)
        fused_linear(gate, tiles - 1, x, Matrix(raw, codec, WIDTH))
        fused_decide(gate, x, named, memory, named, bundle)
        fused_norm(x, x[0], None, "rms", 1e-5, WIDTH)
        fused_rotate(x, 128, *torch.zeros(2, 100, 64), tiles)
        kept = torch.zeros(4, 2, 128, 256, dtype=torch.uint8)
        fused_append(Kv(kept, kept, "f16", (128, 128)), tiles, x[:, :256].contiguous(), x[:, :256].contiguous(), 0, 1)
        fused_attend(torch.zeros(tokens, 1024), Kv(kept, kept, "f16", (128, 128)), 96 * tiles, 8, Scoring())
        fused_copy(kept.view(-1), PLACES[:tiles], kept.view(-1), PLACES[:tiles], 512 * tiles, torch.device("cpu"))
        fused_ffn(torch.zeros(tokens, WIDTH), x, torch.zeros(tiles, tokens, 64), memory, named, bundle)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compiled
    main(sys.argv[2])
