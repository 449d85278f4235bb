"""The fused sparse feed-forward on a card against a copy of as many bytes, and against torch.

    python -m benchmarks.gpu_ffn [--codecs f16 int8 int4g64 nf4] [--active 0.05] [--slots 0.25] [--rounds 31]
                                 [--out benchmarks/results/gpu_ffn.md]

A layer is 16384 gated neurons of width 4096, of which `--slots` have a slot in the card's memory; there are 32 layers,
each with slots of its own, so that nothing is in the L2 cache when its turn comes. One token, whose active neurons
(`--active` of a layer, drawn beforehand, in no order) all have slots.

*fused*: `fused_ffn`, as the runtime calls it. *torch*, for f16 and bf16 only: `index_select` of the same bundles, and
`matmul` in their type with the up rows and the down rows. *copy*: as many bytes from one place of the card's memory to
another, through 32 of each. All are CUDA graphs of one pass through the 32 layers, timed by device events, in turn, in
an order that changes with the round. Given are medians (range) over the rounds, bytes being those of the active
bundles, once; of the shares, which are taken round by round, likewise.

Before anything is timed, results of fused and torch are compared with float64, and fused with itself, bit for bit.
Without a card it says so, and nothing is measured. `--check` compares small layers, on any device, and ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.on_card import DISTINCT, HALVES, Row, check, measure, parser_of, run
from flashinfer.backend.base import Bundle, Part
from flashinfer.config import TILE_NEURONS
from flashinfer.quant import codec_named

NEURONS, WIDTH, LAYERS = 16384, 4096, 32


class Working:
    """Slots of some layers on a device, a token for them, and who is active.

    Attributes:
        bundle: how a slot lies. offsets: int64 `[layers, tiles, TILE_NEURONS]`, 0 where a tile is filled up.
        fired: float32 `[tiles, 1, TILE_NEURONS]`. active: so many neurons of a layer.
    """

    def __init__(self, codec: str, layers: int, slots: int, width: int, active: int, device: str) -> None:
        import torch

        row = codec_named(codec).row_bytes(width)
        self.codec, self.label, self.active, self.layers, self.size = codec, codec, active, layers, 2 * row * active
        self.bundle = Bundle(2 * row, Part(row, width, codec), Part(0, width, codec))
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((2 * min(slots, DISTINCT), width)).astype(np.float32) / np.float32(width**0.5)
        some = torch.from_numpy(codec_named(codec).encode(rows).reshape(-1, 2 * row)).to(device)
        self.memory = some.repeat(-(-layers * slots // len(some)), 1)[: layers * slots].contiguous().view(-1)
        tiles = -(-active // TILE_NEURONS)
        places, fired = np.zeros((layers, tiles * TILE_NEURONS), np.int64), np.zeros(tiles * TILE_NEURONS, np.float32)
        for layer in range(layers):
            places[layer, :active] = (layer * slots + rng.permutation(slots)[:active]) * 2 * row
        fired[:active] = np.abs(rng.standard_normal(active)) + 0.1
        self.offsets = torch.from_numpy(places).view(layers, tiles, TILE_NEURONS).to(device)
        self.fired = torch.from_numpy(fired).view(tiles, 1, TILE_NEURONS).to(device)
        self.x = torch.from_numpy(rng.standard_normal((1, width)).astype(np.float32)).to(device)
        self.acc = torch.zeros(1, width, device=device)
        self.places = self.offsets.view(layers, -1)[:, :active] // self.bundle.bytes

    def fused(self, layer: int) -> None:
        """Add a layer to `acc`."""
        from flashinfer.backend.triton_ffn import fused_ffn

        fused_ffn(self.acc, self.x, self.fired, self.memory, self.offsets[layer], self.bundle)

    def torch(self, layer: int) -> None:
        """The same by a gather and two products, in the type of the weights."""
        import torch

        kind = getattr(torch, HALVES[self.codec])
        rows = self.memory.view(-1, self.bundle.bytes).index_select(0, self.places[layer]).view(kind)
        up, down = rows.view(self.active, 2, -1).unbind(1)
        h = (up @ self.x[0].to(kind)) * self.fired.view(-1)[: self.active].to(kind)
        self.acc += (h @ down).float()

    def expected(self, layer: int) -> np.ndarray:
        """What a layer adds, in float64."""
        raw = self.memory.view(-1, self.bundle.bytes)[self.places[layer]].cpu().numpy()
        codec, half, width = codec_named(self.codec), self.bundle.bytes // 2, self.x.shape[1]
        up, down = (codec.decode(np.ascontiguousarray(part), width) for part in (raw[:, :half], raw[:, half:]))
        h = (up.astype(np.float64) @ self.x[0].cpu().numpy()) * self.fired.view(-1)[: self.active].cpu().numpy()
        return np.asarray(h @ down)

    def found(self, who: Callable[[int], None], layer: int) -> np.ndarray:
        """What it adds for a layer."""
        self.acc.zero_()
        who(layer)
        return np.asarray(self.acc[0].cpu().numpy())


def main(argv: list[str] | None = None) -> int:
    p = parser_of(__doc__, "layers")
    p.add_argument("--active", type=float, default=0.05, help="share of a layer's neurons (default: 0.05)")
    p.add_argument("--slots", type=float, default=0.25, help="share of a layer's neurons in slots (default: 0.25)")
    a = p.parse_args(argv)

    def measured(codec: str) -> list[Row]:
        working = Working(codec, LAYERS, round(NEURONS * a.slots), WIDTH, round(NEURONS * a.active), "cuda")
        check(working)
        return [measure(working, a.rounds)]

    about = f"{LAYERS} layers of {NEURONS} x {WIDTH}, {a.active:.0%} of the neurons active, {a.slots:.0%} in slots"
    title = "The sparse feed-forward on a card"
    return run(a, "gpu_ffn", title, about, lambda codec, device: Working(codec, 2, 90, 96, 70, device), measured)


if __name__ == "__main__":
    raise SystemExit(main())
