"""Products of matrices with one token on a card against a copy of as many bytes, and against torch.

    python -m benchmarks.gpu_linear [--codecs f16 int8 int4g64 nf4] [--shapes 4096x4096 16384x4096] [--rounds 31]
                                    [--out benchmarks/results/gpu_linear.md]

A shape is rows x columns. There are as many matrices of it as take 2 GiB (at least 32), so that nothing is in the L2
cache when its turn comes. *fused*: `fused_linear`, as the runtime calls it. *torch*, for f16 and bf16 only: a matrix
times a vector in the type of the weights. The method is that of `benchmarks/on_card.py`: CUDA graphs of one pass
through all matrices, timed by device events, in turn with a *copy*; results are compared with float64 first.

Without a card it says so, and nothing is measured. `--check` compares small matrices, on any device, and ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.on_card import DISTINCT, HALVES, Row, check, measure, parser_of, run
from flashinfer.quant import codec_named
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
    p = parser_of(__doc__, "matrices")
    p.add_argument("--shapes", nargs="+", default=[(4096, 4096), (16384, 4096)], type=shape, metavar="ROWSxCOLUMNS")
    a = p.parse_args(argv)

    def measured(codec: str) -> list[Row]:
        found = []
        for rows, cols in a.shapes:
            layers = max(LEAST, TOTAL // (rows * codec_named(codec).row_bytes(cols)))
            working = Matrices(codec, rows, cols, layers, "cuda")
            check(working)
            found.append(measure(working, a.rounds))
        return found

    title, about = "Products of matrices with one token on a card", f"as many matrices as take {TOTAL / GIB:.0f} GiB"
    return run(a, "gpu_linear", title, about, lambda codec, device: Matrices(codec, 90, 200, 2, device), measured)


if __name__ == "__main__":
    raise SystemExit(main())
