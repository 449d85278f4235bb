"""What a router listens to, and what of its choices comes back: the shares asked for, and how they are measured.

Of Qwen3-30B-A3B, continuing three prompts by 512 tokens each, kekzl/imp (pull requests 1358 and 1359 on GitHub, 2026)
reports that 45 % of a token's experts are among those of the token before and 80 % among those of the eight before (by
chance: 6 and 40 %); that the best 40 % of the experts hold 92 % of the choices of the text they were chosen on, and
68 % of others'; and that LRU with slots for 40 % hits 90 to 95 %. We plant a little less. Models differ: Mixtral's
router repeats less (arXiv 2401.04088, table 5); most repeat those with experts in every layer and none shared, as here
(arXiv 2505.16056).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
RECENT = 8
"""Tokens back in `within`."""
BUSIEST = 0.25
"""The share of the experts counted as busy."""


@dataclass(frozen=True)
class Mix:
    """What the products of a router are made of: their variance over the tokens of a text from the token itself, the
    last few, the last dozens, and noise that goes with the token; these sum to 1. popularity: standard deviation of
    what each expert has on top, at all tokens."""

    token: float = 0.27
    short: float = 0.23
    long: float = 0.42
    noise: float = 0.08
    popularity: float = 0.45


def repeated(chosen: Mask) -> float:
    """Mean share of a token's experts that were the previous token's, too; `chosen` is `[tokens, experts]`."""
    return within(chosen, 1)


def within(chosen: Mask, back: int = RECENT) -> float:
    """Mean share of a token's experts that one of the `back` tokens before had."""
    had = [chosen[n] & chosen[n - back : n].any(axis=0) for n in range(back, len(chosen))]
    return float(np.sum(had) / chosen[back:].sum())


def busiest(chosen: Mask) -> float:
    """Share of the choices that are of the `BUSIEST` experts of this text."""
    counts = np.sort(chosen.sum(axis=0))[::-1]
    return float(counts[: round(BUSIEST * len(counts))].sum() / counts.sum())
