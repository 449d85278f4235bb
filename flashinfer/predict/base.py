"""The interface of a predictor: who may fire, before the bundles are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Buffer, Flags

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """Where the step's tokens are: rows skip .. skip+count of its buffers."""

    skip: int
    count: int


@dataclass(frozen=True)
class Matrices:
    """What a predictor may compute with: dense matrices by role, wherever they are.

    product: role of a matrix and input `[rows, in]` to their product `[rows, out]`. linear: the same for a role without
    `.weight`, whose bias is added where there is one. vector: a resident vector.
    """

    backend: Backend
    product: Callable[[str, Buffer], Buffer]
    linear: Callable[[str, Buffer], Buffer]
    vector: Callable[[str], Buffer | None]


@dataclass(frozen=True)
class Guess:
    """What a predictor says of one layer and step.

    needed: `[tokens, neurons]`, whom each token may need; None is everyone. final: neurons that are not in
    a token's own set do not contribute to it, whatever their product is (else they are known to be zero). gate: the
    decision products of all neurons, where they are known already; None where they come with the bundles.
    """

    needed: Flags | None
    gate: Buffer | None = None
    final: bool = False


class Predictor(Protocol):
    """Names the active set of a layer. A token's set depends on that token alone, not on those beside it.

    exact: it never leaves out a neuron that fires.
    """

    name: str
    exact: bool

    def guess(self, layer: int, x: Buffer, span: Span) -> Guess:
        """x: the layer's FFN input `[rows, hidden]`, normed."""
        ...
