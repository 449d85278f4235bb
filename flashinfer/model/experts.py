"""Layers of experts: the neurons of those that a step's tokens get, as they arrive.

A tile of neurons is of one expert, at the same place whatever else is needed, so what it adds does not depend on how
tiles are grouped (`docs/architecture.md`, "Exact by construction"). Only tiles of needed experts are ever looked at: no
buffer is as wide as a layer has neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Buffer, Bundle
from flashinfer.config import EXPERT_WORK, TILE_NEURONS, TILE_ROWS
from flashinfer.model.rows import Rows
from flashinfer.model.weights import Ahead, Group, Need, Weights, decode_tiles, unit_tiles
from flashinfer.predict import Matrices, Router, Selection, Span
from flashinfer.store import Experts, Facts

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def units_of(columns: Index, experts: Experts) -> Index:
    """The units of neurons, each as many as an expert has, that experts of these columns of `shares` lie in."""
    routed = columns[columns < experts.count]
    if len(routed) == len(columns):
        return columns
    return np.concatenate([routed, np.arange(experts.count, -(-experts.neurons // experts.size))])


def neurons_of(columns: Index, experts: Experts) -> Index:
    """All neurons of these experts, sorted."""
    tiles = unit_tiles(units_of(columns, experts), experts.size, experts.neurons)
    return tiles[tiles >= 0]


class Mixture:
    """Runs layers of experts. Holds nothing of a step.

    per_token: how many experts a token gets. window: of how many of a step's last tokens the cache is told what they
    needed. everything: experts that nobody chose are read, too, and add nothing.
    """

    def __init__(
        self, facts: Facts, weights: Weights, matrices: Matrices, per_token: int, window: int, *, everything: bool
    ) -> None:
        self._facts, self._weights, self._matrices = facts, weights, matrices
        self._router = Router(matrices, facts, per_token)
        self._window, self._everything = window, everything

    def shares(self, layer: int, x: Buffer, rows: Rows) -> Floats:
        """What the step's tokens take of each expert, as `Router.shares`."""
        return self._router.shares(layer, x, Span(rows.skip, rows.count))

    def run(self, layer: int, x: Buffer, shares: Floats, rows: Rows, bundle: Bundle, guess: Ahead) -> Buffer:
        """What the experts add, `[rows.total, hidden]`. x: the layer's FFN input."""
        experts, backend = self._facts.routed(layer), self._weights.backend
        assert experts is not None
        need = self._need(shares, experts)
        tiles = need.tiles
        owners = np.minimum(tiles[:, 0] // experts.size, experts.count)
        every = np.zeros((experts.columns, rows.total), dtype=np.float32)
        every[:, rows.skip : rows.skip + rows.count] = shares.T
        out = self._biases(layer, every[: experts.count])
        for group in self._weights.neurons(layer, need, guess):
            if rows.total == 1:
                self._add(out, x, every[owners[group.first : group.last]], group, bundle)
                continue
            for part in _by_owner(group, owners):
                shared = every[owners[part.first]]
                who = _together(shared != 0, backend.together)
                if not len(who):
                    continue
                acc, weights = backend.take(out, who), np.tile(shared[who], (part.last - part.first, 1))
                self._add(acc, backend.take(x, who), weights, part, bundle)
                backend.put(out, who, acc)
        return out

    def _add(self, acc: Buffer, x: Buffer, weights: Floats, group: Group, bundle: Bundle) -> None:
        """Add what a group's neurons give for x, `[tokens, hidden]`. weights: of its tiles, `[tiles, tokens]`."""
        backend, tokens = self._weights.backend, weights.shape[1]
        for part in _parts(group, tokens):
            some = _numbered(part.index)
            gate = backend.zeros(tokens, len(some) * TILE_ROWS)
            backend.decide(gate, x, some, part.memory, part.offsets, bundle)
            fired = backend.fire(gate, self._facts.activation, some, self._facts.fires_above)
            backend.weigh(fired, weights[part.first - group.first : part.last - group.first])
            backend.ffn(acc, x, fired, part.memory, part.offsets, bundle)

    def _biases(self, layer: int, shares: Floats) -> Buffer:
        """What experts add whatever they are given: their biases by what is taken of them, `[tokens, hidden]`. shares:
        `[experts, tokens]`."""
        role, backend = f"layers.{layer}.ffn.expert_bias", self._weights.backend
        if not self._weights.has(f"{role}.weight"):
            return backend.zeros(shares.shape[1], self._facts.hidden_size)
        return self._matrices.linear(role, backend.place(np.ascontiguousarray(shares.T)))

    def active(self, layer: int, shares: Floats) -> npt.NDArray[np.bool_]:
        """Whose neurons each token gets, `[tokens, neurons]`: for who looks on."""
        experts = self._facts.routed(layer)
        assert experts is not None
        owners = np.minimum(np.arange(experts.neurons) // experts.size, experts.count)
        return np.asarray((shares != 0)[:, owners])

    def expected(self, layer: int, x: Buffer) -> Need:
        """What one token with that input needs; of a dense layer that is everyone."""
        experts = self._facts.routed(layer)
        if experts is None:
            every = np.arange(self._facts.neurons(layer))
            return Need(lambda: (Selection(every), decode_tiles(every)))
        return self._need(self._router.shares(layer, x, Span(0, 1)), experts)

    def _need(self, shares: Floats, experts: Experts) -> Need:
        return Need(partial(self._select, shares, experts))

    def _select(self, shares: Floats, experts: Experts) -> tuple[Selection, Index]:
        """The neurons the step needs, and their tiles."""
        if self._everything:
            every = np.arange(experts.columns)
            return Selection(np.arange(experts.neurons)), self._tiles(every, experts)
        chosen = shares != 0  # what is not a number counts
        needed = np.flatnonzero(chosen.any(axis=0))
        last = chosen[max(0, len(chosen) - self._window) :] if len(chosen) > 1 else chosen[:0]
        recent = tuple(neurons_of(np.flatnonzero(token), experts) for token in last)
        return Selection(neurons_of(needed, experts), recent), self._tiles(needed, experts)

    def _tiles(self, columns: Index, experts: Experts) -> Index:
        return unit_tiles(units_of(columns, experts), experts.size, experts.neurons)


def _part(group: Group, first: int, last: int) -> Group:
    some = slice(first - group.first, last - group.first)
    return Group(first, last, group.memory, group.index[some], group.offsets[some])


def _parts(group: Group, tokens: int) -> Iterator[Group]:
    """The group in parts whose products and activations take `EXPERT_WORK` bytes at most."""
    step = max(1, EXPERT_WORK // (4 * max(1, tokens) * (TILE_ROWS + TILE_NEURONS)))
    for first in range(group.first, group.last, step):
        yield _part(group, first, min(group.last, first + step))


def _by_owner(group: Group, owners: Index) -> Iterator[Group]:
    """The group in parts of one expert each; tiles of an expert lie together."""
    ends = np.flatnonzero(np.diff(owners[group.first : group.last], append=-1)) + group.first + 1
    for first, last in zip([group.first, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield _part(group, first, last)


def _together(needed: npt.NDArray[np.bool_], unit: int) -> Index:
    """The needed rows, and those that must be taken out with them."""
    return np.flatnonzero(needed.reshape(-1, unit).any(axis=1).repeat(unit))


def _numbered(tiles: Index) -> Index:
    """Where products of the tiles' neurons go: each tile begins a row tile of its own, as it would beside any other."""
    places = np.arange(len(tiles))[:, None] * TILE_ROWS + np.arange(TILE_NEURONS)
    return np.where(tiles >= 0, places, -1)
