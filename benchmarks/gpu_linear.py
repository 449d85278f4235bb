"""Products of matrices with one token on a card against a copy of as many bytes, and against torch.

    python -m benchmarks.gpu_linear [--codecs f16 int8 int4g64 nf4] [--shapes 4096x4096 16384x4096] [--rounds 31]
                                    [--out benchmarks/results/gpu_linear.md]

A shape is rows x columns. There are as many matrices of it as take 2 GiB (at least 32), so that nothing is in the L2
cache when its turn comes. *fused*: `fused_linear`, as the runtime calls it. *torch*, for f16 and bf16 only: a matrix
times a vector in the type of the weights. The method is that of `benchmarks/gpu_ffn.py`: CUDA graphs of one pass
through all matrices, timed by device events, in turn with a *copy*; results are compared with float64 first.

Without a card it says so, and nothing is measured. `--check` compares small matrices, on any device, and ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu_ffn import (
    DISTINCT,
    HALVES,
    check,
    describe,
    device_to_check,
    markdown,
    measure,
    needs_card,
    needs_triton,
)  # fmt: skip
from flashinfer.quant import CODECS, codec_named
from flashinfer.units import GIB

TOTAL, LEAST = 2 * GIB, 32
"""Bytes of all matrices of a shape, and how many there are at least."""


class Matrices:
    """Matrices of one shape on a device, and a token for them. Of rows, `DISTINCT` are encoded, and repeated."""

    def __init__(self, codec: str, rows: int, cols: int, layers: int, device: str) -> None:
        import torch

        self.codec, self.label, self.layers = codec, f"{codec} {rows}x{cols}", layers
        rng = np.random.default_rng(0)
        some = rng.standard_normal((min(rows, DISTINCT), cols)).astype(np.float32) / np.float32(cols**0.5)
        raw = torch.from_numpy(codec_named(codec).encode(some)).to(device)
        self.raw = raw.repeat(-(-layers * rows // len(raw)), 1)[: layers * rows].view(layers, rows, -1)
        self.size = self.raw[0].numel()
        self.x = torch.from_numpy(rng.standard_normal((1, cols)).astype(np.float32)).to(device)
        self.out = torch.zeros(1, rows, device=device)

    def fused(self, layer: int) -> None:
        """Multiply a matrix; to `out`."""
        from flashinfer.backend.torch_weights import Matrix
        from flashinfer.backend.triton_linear import fused_linear

        fused_linear(self.out, 0, self.x, Matrix(self.raw[layer], self.codec, self.x.shape[1]))

    def torch(self, layer: int) -> None:
        """The same in the type of the weights."""
        import torch

        kind = getattr(torch, HALVES[self.codec])
        self.out[0] = torch.mv(self.raw[layer].view(kind), self.x[0].to(kind))

    def expected(self, layer: int) -> np.ndarray:
        """The products, in float64."""
        rows = codec_named(self.codec).decode(self.raw[layer].cpu().numpy(), self.x.shape[1])
        return np.asarray(rows.astype(np.float64) @ self.x[0].cpu().numpy())

    def found(self, who: Callable[[int], None], layer: int) -> np.ndarray:
        """What it makes of a matrix."""
        self.out.zero_()
        who(layer)
        return np.asarray(self.out[0].cpu().numpy())


def shape(text: str) -> tuple[int, int]:
    rows, cols = (int(n) for n in text.split("x"))
    return rows, cols


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--codecs", nargs="+", default=["f16", "int8", "int4g64", "nf4"], choices=list(CODECS))
    p.add_argument("--shapes", nargs="+", default=[(4096, 4096), (16384, 4096)], type=shape, metavar="ROWSxCOLUMNS")
    p.add_argument("--rounds", type=int, default=31)
    p.add_argument(
        "--check", action="store_true", help="compare small matrices and end, on the CPU where there is no card"
    )
    p.add_argument("--out", type=Path, help="write the report here, too")
    a = p.parse_args(argv)
    needs_triton()
    if a.check:
        device = device_to_check()
        for codec in a.codecs:
            check(Matrices(codec, 90, 200, 2, device))
        print(f"{', '.join(a.codecs)}: results are right and repeat, on {device}")
        return 0
    needs_card()
    table = []
    for codec in a.codecs:
        for rows, cols in a.shapes:
            layers = max(LEAST, TOTAL // (rows * codec_named(codec).row_bytes(cols)))
            working = Matrices(codec, rows, cols, layers, "cuda")
            check(working)
            table.append(measure(working, a.rounds))
    text = markdown(
        "Products of matrices with one token on a card",
        table,
        [*describe("python -m benchmarks.gpu_linear"), f"- {a.rounds} rounds"],
    )
    print(text, end="")
    if a.out is not None:
        a.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
