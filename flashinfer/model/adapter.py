"""What a LoRA adapter (arXiv 2106.09685) adds at run time, on one backend: `scale * B (A x)` beside `W x`.

Products with thin matrices are ordinary products, in the order of sums every other product has: so a run with an
adapter, too, gives the same bits at every cap. Its bytes are resident and in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from flashinfer.adapter import Change, Factor
from flashinfer.backend import Backend, Buffer, Bundle, Part
from flashinfer.model.weights import Group


class Feed(Protocol):
    """Sums what the neurons of a layer add to its output, group by group."""

    def take(self, fired: Buffer, group: Group) -> None:
        """A group of tiles: activated decision products `[tiles, tokens, TILE_NEURONS]` of its neurons."""
        ...

    def result(self) -> Buffer:
        """The sum over all groups `[tokens, hidden]`; to be asked for once."""
        ...


class PlainFeed:
    """A layer whose neurons are as the store has them."""

    def __init__(self, backend: Backend, bundle: Bundle, x: Buffer) -> None:
        self._backend, self._bundle, self._x = backend, bundle, x
        self._out = backend.zeros(len(x), bundle.down.elements)

    def take(self, fired: Buffer, group: Group) -> None:
        """See `Feed.take`."""
        self._backend.ffn(self._out, self._x, fired, group.memory, group.offsets, self._bundle)

    def result(self) -> Buffer:
        """See `Feed.result`."""
        return self._out


@dataclass(frozen=True)
class _Placed:
    """A change on the backend. `a`: a matrix; of `down` its values themselves, a row for each neuron."""

    a: Buffer
    b: Buffer
    rank: int
    out: int
    scale: float


class AdaptedFeed:
    """A layer with an adapter on `up` or `down`: what `Backend.ffn` does at once, in steps between which it is added.

    up: the adapter's share of the up products `[tokens, neurons]`, zeros where it has none; overwritten. None where the
    FFN has no `up` beside its decision. down: the change of `down`, if any.
    """

    def __init__(self, adapter: Adapter, bundle: Bundle, x: Buffer, up: Buffer | None, down: _Placed | None) -> None:
        self._adapter, self._backend, self._x, self._up, self._down = adapter, adapter.backend, x, up, down
        self._ups = replace(bundle, decision=bundle.up, decision_bias=bundle.up_bias)
        self._downs = replace(bundle, up=None, up_bias=None, up_activation=None)
        self._out = self._backend.zeros(len(x), bundle.down.elements)
        self._sums = None if down is None else self._backend.zeros(len(x), down.rank)

    def take(self, fired: Buffer, group: Group) -> None:
        """See `Feed.take`."""
        backend, h = self._backend, fired
        if self._up is not None:
            backend.decide(self._up, self._x, group.index, group.memory, group.offsets, self._ups)
            h = backend.multiply(fired, backend.fire(self._up, self._ups.up_activation, group.index))
        backend.ffn(self._out, self._x, h, group.memory, group.offsets, self._downs)
        if self._down is not None:  # A h: rows of A are bundles, too
            a: Factor = self._down.a
            width = len(a.raw) // a.rows
            bundle = Bundle(width, Part(0, a.cols, a.codec))
            backend.ffn(self._sums, self._sums, h, a.raw, group.index.clip(0) * width, bundle)

    def result(self) -> Buffer:
        """See `Feed.result`."""
        if self._down is None:
            return self._out
        return self._backend.add(self._out, self._adapter.widened(self._down, self._sums))


class Adapter:
    """The changes of an adapter by role, on a backend. Without any it adds nothing.

    Raises CheckpointError where `changes` does, reading them.
    """

    def __init__(self, backend: Backend, changes: Iterable[tuple[str, Change]] = ()) -> None:
        self.backend = backend
        self._placed = {role: self._place(role, change) for role, change in changes}

    def change(self, role: str, x: Buffer) -> Buffer | None:
        """`scale * B (A x)`, `[tokens, out]`, for the matrix of that role; None where it stays as it is."""
        placed = self._placed.get(role)
        return None if placed is None else self.widened(placed, self._product(placed.a, placed.rank, x))

    def add(self, out: Buffer, role: str, x: Buffer) -> Buffer:
        """The product with the matrix of that role, with its change. Overwrites and returns `out`."""
        change = self.change(role, x)
        return out if change is None else self.backend.add(out, change)

    def start(self, role: str, x: Buffer, width: int) -> Buffer:
        """What products with rows of that matrix are added to, one by one: its change, or zeros `[tokens, width]`."""
        change = self.change(role, x)
        return self.backend.zeros(len(x), width) if change is None else change

    def feed(self, layer: int, bundle: Bundle, x: Buffer, neurons: int) -> Feed:
        """For the neurons of a layer and its input `[tokens, hidden]`."""
        up, down = f"layers.{layer}.ffn.up.weight", f"layers.{layer}.ffn.down.weight"
        if down not in self._placed and (bundle.up is None or up not in self._placed):
            return PlainFeed(self.backend, bundle, x)
        share = None if bundle.up is None else self.start(up, x, neurons)
        return AdaptedFeed(self, bundle, x, share, self._placed.get(down))

    def widened(self, placed: _Placed, narrow: Buffer) -> Buffer:
        """`scale * B narrow`, of `[tokens, rank]`. Overwrites `narrow`."""
        return self._product(placed.b, placed.out, self.backend.multiply(narrow, placed.scale))

    def _product(self, matrix: Buffer, rows: int, x: Buffer) -> Buffer:
        out = self.backend.empty(len(x), rows)
        self.backend.linear(out, 0, x, matrix)
        return out

    def _place(self, role: str, change: Change) -> _Placed:
        def matrix(f: Factor) -> Buffer:
            return self.backend.matrix(f.raw, f.codec, f.rows, f.cols, keep=True)

        a = change.a if role.endswith(".ffn.down.weight") else matrix(change.a)
        return _Placed(a, matrix(change.b), change.b.cols, change.b.rows, change.scale)
