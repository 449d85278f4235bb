"""What `calibrate` can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import msgspec
import xxhash

from flashinfer import __version__
from flashinfer.errors import PredictorError
from flashinfer.store import Manifest
from flashinfer.tune.frontier import RECALLS
from flashinfer.tune.rank import OVER, RECALL, SHARE

Making = Literal["certified", "low-rank", "threshold"]
"""Predictors that calibration makes."""
DENSITIES = (0.7, 0.6, 0.5, 0.4, 0.3)
"""Densities thresholds are offered at."""


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    tokens: of the text, to fit on; held_out: to judge by. context: of the windows it is run in. make: predictors; empty
    is what suits the activation. recall: the low-rank predictors', and over: neurons they may name for each that fires;
    share: of the weights' bytes that they may take. recalls, densities: levels that are judged. density: of the
    threshold used when nobody says; None: what max_ppl_increase, a share of perplexity, allows. order: whether neurons
    are moved next to those they fire with.
    """

    tokens: int = 16384
    held_out: int = 2048
    context: int = 256
    make: tuple[Making, ...] = ()
    recall: float = RECALL
    over: float = OVER
    share: float = SHARE
    recalls: tuple[float, ...] = RECALLS
    densities: tuple[float, ...] = DENSITIES
    density: float | None = None
    max_ppl_increase: float = 0.01
    order: bool = True
    seed: int = 0

    def key(self, m: Manifest, text: str) -> str:
        """Names a calibration: of these weights and that tokenizer, by that text, so, by this program."""
        files = [entry.xxh3 for entry in (m.dense, m.neurons, *m.text.values())]
        said = msgspec.json.encode([__version__, files, text, asdict(self)])
        return xxhash.xxh3_128_hexdigest(said)

    def suited(self, m: Manifest) -> Options:
        """With the predictors to make named.

        Raises:
            PredictorError: one is asked for that this model cannot have.
        """
        facts = m.facts
        possible: tuple[Making, ...] = ("certified", "low-rank") if facts.sparse else ("threshold",)
        if not facts.sparse and not facts.gated:
            possible = ()
        for name in self.make:
            if name not in possible:
                can = ", ".join(possible) or "none"
                raise PredictorError(
                    f"a {name} predictor does not suit {facts.activation} in a {'gated' if facts.gated else 'plain'} "
                    f"feed-forward layer; possible: {can}"
                )
        if not possible:
            raise PredictorError(
                f"every neuron is needed at every token: {facts.activation} in a plain feed-forward layer is never "
                "zero, and thresholds are for gated layers; there is nothing to calibrate"
            )
        make = self.make or possible
        if "low-rank" in make and "certified" not in make:
            make = ("certified", *make)  # decision matrices go into the bundles: without it nothing would be exact
        recalls = tuple(sorted({*self.recalls, self.recall}))
        asked = () if self.density is None else (self.density,)
        densities = tuple(sorted({*self.densities, *asked}, reverse=True))
        return replace(self, make=make, recalls=recalls, densities=densities)
