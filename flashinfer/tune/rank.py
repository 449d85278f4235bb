"""How large a low-rank predictor should be, layer by layer, within bytes for all of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flashinfer.quant import codec_named

LADDER: Final = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Ranks that are tried: multiples of 32, which is what a block of int8g32 holds."""
RECALL: Final = 0.95
"""Recall at which ranks are judged (that of the paper)."""
OVER: Final = 3.0
"""Neurons that may be named there for each that fires (the paper's 3)."""
SHARE: Final = 0.05
"""Of a model's weight bytes, what the predictors of all layers may take."""
CODEC: Final = "int8g32"
"""Of the factors: under 1 % more neurons are named than with f32, and twice the rank of f16 takes the same bytes."""


def factor_bytes(hidden: int, neurons: int, rank: int, codec: str = CODEC) -> int:
    """Bytes of a layer's factors and bias, in the file and in memory."""
    row_bytes = codec_named(codec).row_bytes
    return rank * row_bytes(hidden) + neurons * row_bytes(rank) + 4 * neurons


def ladder(hidden: int, neurons: int, most: int, codec: str = CODEC) -> tuple[int, ...]:
    """The ranks worth trying for a layer: no more than `most` bytes, and, but for the least, at most half of either
    side of the matrix, beyond which the decision matrix itself is the better predictor. Empty where not even the
    least fits, or is more than a side."""
    side = min(hidden, neurons)
    ranks = [r for r in LADDER if 2 * r <= side or r == LADDER[0] <= side]
    return tuple(r for r in ranks if factor_bytes(hidden, neurons, r, codec) <= most)


def next_rank(ranks: Sequence[int], over: Mapping[int, float], asked: float, start: int) -> int | None:
    """Which rank to fit next to find the smallest that names at most `asked` neurons for each that fires.

    From `start` on up while that is too many, down while it is few enough, so that in the end the rank below the one
    found is known, too. None: nothing is left to find.

    Args:
        ranks: the ladder, rising. over: what was measured, by rank. start: a rank of the ladder; what the layer
            before ended with is a good one.
    """
    at = ranks.index(start)
    if start not in over:
        return start
    up = over[start] > asked
    for rank in ranks[at + 1 :] if up else reversed(ranks[:at]):
        if rank not in over:
            return rank
        if (over[rank] > asked) != up:
            return None
    return None


def smallest(ranks: Sequence[int], over: Mapping[int, float], asked: float) -> int:
    """The smallest measured rank that names at most `asked`, or the one that names fewest."""
    known = [r for r in ranks if r in over]
    return next((r for r in known if over[r] <= asked), min(known, key=lambda r: (over[r], r)))


def estimate(over: Mapping[int, float], rank: int) -> float:
    """What a rank names for each neuron that fires: measured, or along the line through the nearest two measured,
    both on logarithmic scales (through the only one: as the root of the rank); never under 1."""
    if rank in over:
        return over[rank]
    near = sorted(over, key=lambda r: abs(math.log(r / rank)))[:2]
    slope = -0.5
    if len(near) == 2:
        slope = math.log(over[near[1]] / over[near[0]]) / math.log(near[1] / near[0])
    return max(1.0, over[near[0]] * float((rank / near[0]) ** min(slope, 0.0)))


@dataclass(frozen=True)
class Need:
    """What the choice of a layer's rank rests on.

    ranks: the ladder, rising. wanted: the rank it should have. over: neurons named for each that fires, by rank, as far
    as measured. fired: bytes of the neurons that fire for a token. size: bytes of the factors, by rank.
    """

    ranks: tuple[int, ...]
    wanted: int
    over: Mapping[int, float]
    fired: float
    size: Mapping[int, int]

    def named(self, rank: int) -> float:
        """Bytes of the neurons that are named for a token."""
        return self.fired * estimate(self.over, rank)

    def step(self, rank: int, to: int) -> tuple[float, int]:
        """Bytes less named for a token, by byte of factors more, and how many more those are."""
        more = self.size[to] - self.size[rank]
        return (self.named(rank) - self.named(to)) / more, more


def allocate(layers: Sequence[Need], budget: int) -> tuple[int, ...]:
    """A rank for each layer, none above what it wants, so that the factors of all fit `budget` bytes together.

    All begin with the least; then the step up that saves most reading for its bytes, as long as one fits. Ranks that
    were never measured may come out: their over-prediction is estimated, and whoever asks measures them and asks again.

    Raises:
        ValueError: not even the least ranks fit.
    """
    chosen = [layer.ranks[0] for layer in layers]
    left = budget - sum(layer.size[rank] for layer, rank in zip(layers, chosen, strict=True))
    if left < 0:
        raise ValueError(f"predictors of the least rank take {budget - left} bytes, and {budget} are allowed")
    while True:
        steps = [
            (*layer.step(rank, to), place, to)
            for place, (layer, rank) in enumerate(zip(layers, chosen, strict=True))
            for to in layer.ranks
            if rank < to <= layer.wanted
        ]
        fitting = [step for step in steps if step[1] <= left]
        if not fitting:
            return tuple(chosen)
        _, more, place, to = max(fitting)
        chosen[place], left = to, left - more
