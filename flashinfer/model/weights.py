"""Where a decoder gets its weights: the interface the streamed store and the test twin share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend, Buffer, Bundle, Flags, Numbers
from flashinfer.config import TILE_NEURONS
from flashinfer.predict import Selection

Index = npt.NDArray[np.int64]


def decode_tiles(needed: Index) -> Index:
    """The needed neurons packed into tiles in original order, `[tiles, TILE_NEURONS]`, -1 at the end."""
    tiles = np.full((-(-len(needed) // TILE_NEURONS), TILE_NEURONS), -1, dtype=np.int64)
    tiles.reshape(-1)[: len(needed)] = needed
    return tiles


def unit_tiles(units: Index, unit: int, neurons: int) -> Index:
    """Tiles of consecutive neurons that cross no multiple of `unit`, `[tiles, TILE_NEURONS]`, -1 where one ends. Unit u
    is neurons u * unit .. (u + 1) * unit, but for those from `neurons` on."""
    within = np.arange(-(-unit // TILE_NEURONS) * TILE_NEURONS)
    tiles = units[:, None] * unit + within
    tiles[(within >= unit)[None, :] | (tiles >= neurons)] = -1
    tiles = tiles.reshape(-1, TILE_NEURONS)
    return tiles[tiles[:, 0] >= 0]


def prefill_tiles(needed: Index, neurons: int) -> Index:
    """Tiles of consecutive neuron indices, each neuron at the same place whatever the chunk; tiles that nobody
    needs are left out (they would add exact zeros), other neurons that nobody needs are -1."""
    tiles = np.full((-(-neurons // TILE_NEURONS), TILE_NEURONS), -1, dtype=np.int64)
    tiles.reshape(-1)[needed] = needed
    return tiles[(tiles >= 0).any(axis=1)]


class Need:
    """The neurons that a step needs of a layer. They come to the host when `selection` or `tiles` is looked at.

    Args:
        flags: who is needed where arithmetic is, of one token; None: only `found` knows.
        found: who is needed, and the tiles they are computed in; called at most once.
    """

    def __init__(self, found: Callable[[], tuple[Selection, Index]], flags: Flags | None = None) -> None:
        self._found, self.flags = found, flags

    @cached_property
    def _both(self) -> tuple[Selection, Index]:
        return self._found()

    @property
    def selection(self) -> Selection:
        """Who is needed."""
        return self._both[0]

    @property
    def tiles(self) -> Index:
        """`[n, TILE_NEURONS]`: original indices, -1 for padding or a neuron nobody needs (its bytes read as zeros)."""
        return self._both[1]


Ahead = Callable[[], Need | None]
"""Called at most once, while reads are under way: what the next layer will probably need, which may then be read before
it is asked for; None where there is no telling."""


def no_guess() -> Need | None:
    """Nothing is known of the next layer."""
    return None


@dataclass(frozen=True)
class Group:
    """Tiles first .. last of a need: neurons `index` `[last - first, TILE_NEURONS]`, -1 for padding, whose bytes are in
    `memory` now, at `offsets` of the same shape. Both are on the host, or where arithmetic is.

    Valid until the next group is asked for.
    """

    first: int
    last: int
    memory: npt.NDArray[np.uint8]
    index: Numbers
    offsets: Numbers


class Weights(Protocol):
    """All weights of one model, by role (`docs/format.md`), on one backend."""

    backend: Backend
    looks_ahead: bool
    """Whether guesses about the next layer are of use."""

    def vector(self, role: str) -> Buffer | None:
        """A resident float32 vector, or None where the model has none."""
        ...

    def has(self, role: str) -> bool:
        """Whether the model has that matrix."""
        ...

    def rows_of(self, role: str) -> int:
        """Output rows of a matrix."""
        ...

    def blocks(self, role: str) -> Iterator[tuple[int, Buffer]]:
        """A matrix as consecutive row blocks (first row, weights), each starting at a multiple of TILE_ROWS
        and valid until the next is asked for."""
        ...

    def lookup(self, role: str, ids: Index) -> npt.NDArray[np.float32]:
        """Rows of a matrix as float32 `[len(ids), cols]`."""
        ...

    def bundle(self, layer: int) -> Bundle:
        """What a bundle of that layer looks like."""
        ...

    def neurons(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        """The bundles of the neurons that are needed. Groups come in tile order and cover every tile once."""
        ...
