"""Looking on while a model works: what came into each feed-forward layer, and who fired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """One layer in one step, on the host; valid until the observer returns.

    x: FFN inputs, normed, `[tokens, hidden]`. gate: decision products `[tokens, neurons]`, 0 where a product was not
    computed because the neuron was not selected; `[tokens, 0]` of a layer of experts, which keeps none. active: who
    contributed, `[tokens, neurons]`. needed: whom the predictor named for each token; None is everyone.
    """

    x: Floats
    gate: Floats
    active: Mask
    needed: Mask | None


class Observer(Protocol):
    """Told of every layer of every step, in order."""

    def seen(self, layer: int, step: Seen) -> None:
        """What it raises ends the step."""
        ...
