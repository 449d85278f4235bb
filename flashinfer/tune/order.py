"""Neuron order on disk: neurons that fire together next to each other, hot ones first. Pure: masks in, orders out.

Masks are bit-packed, `[tokens, ceil(neurons / 8)]` (`np.packbits(active, axis=1)`): which neurons were active for
which token. An order names the neuron at each position. There are two ways to one, since there are two regimes:

- `linked_order`, RIPPLE's (arXiv 2410.19274, section 4): a path through the graph of co-activation. It makes runs of
  neighbours, and is ahead where a read costs no more than a few bundles, so that holes are rarely read through.
- `bisected_order`, recursive graph bisection (Dhulipala et al., "Compressing graphs and inverted indexes with recursive
  graph bisection", KDD 2016) with the cost of our reads in the place of compressed bits. It gathers what fires
  together into regions and is ahead where bundles are so small that a read bridges many of them.

Which of them, `tune.arrange` decides by replaying tokens. No `[neurons, neurons]` matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Masks = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

BLOCK = 512
"""Neurons whose co-activation with all others is counted at once; a multiple of 8."""
SAMPLES = 4096
"""Tokens unpacked at once."""
EDGES = 64
"""Strongest links kept of each neuron (with 16 a path breaks into twice the pieces, 128 gain nothing)."""
ROUNDS = 20
"""Rounds of exchanges at each bisection, at most; it ends as soon as one gains nothing."""
EXCHANGED = 0.5
"""Share of the exchanges that promise a gain that is made in a round. All at once, they undo each other's gain: fewer
runs by 1-3 % on the embedded model than with all."""


def unpacked(masks: Masks, first: int, last: int) -> Masks:
    """Neurons first .. last of packed masks, as 0 and 1 `[tokens, last - first]`; `first` is a multiple of 8."""
    bits: Masks = np.unpackbits(masks[:, first // 8 : -(-last // 8)], axis=1, count=last - first)
    return bits


def hotness(masks: Masks, neurons: int) -> Index:
    """For how many tokens each neuron was active, `[neurons]`.

    Raises:
        ValueError: the masks are not of so many neurons.
    """
    if masks.ndim != 2 or masks.shape[1] != -(-neurons // 8):
        raise ValueError(f"masks of shape {masks.shape} are not bits of {neurons} neurons")
    heat = np.zeros(neurons, dtype=np.int64)
    for first in range(0, neurons, BLOCK):
        last = min(neurons, first + BLOCK)
        heat[first:last] = unpacked(masks, first, last).sum(axis=0, dtype=np.int64)
    return heat


def hottest_first(masks: Masks, neurons: int) -> Index:
    """Neurons by falling hotness. Raises ValueError as `hotness` does."""
    return np.argsort(-hotness(masks, neurons), kind="stable")


# -- a path of strongest links


def linked_order(masks: Masks, neurons: int, *, edges: int = EDGES) -> Index:
    """Link the most alike pairs of neurons while both have an end free; the paths one after the other, hottest first.

    Alike is Jaccard: tokens that activate both, of those that activate either. By the bare number of common tokens, as
    in RIPPLE, hot neurons take each other's ends and leave hundreds of loose paths: 2-4 % more runs on the embedded
    model.

    Args:
        masks: of the tokens to learn from.
        neurons: of the layer.
        edges: links kept of each neuron, the strongest.

    Raises:
        ValueError: the masks are not of so many neurons.
    """
    heat = hotness(masks, neurons)
    one, other, weight = _strongest(masks, heat, edges)
    strongest = np.argsort(-weight, kind="stable")
    paths = _paths(neurons, one[strongest], other[strongest])
    paths.sort(key=lambda path: -float(heat[path].mean()))
    return np.concatenate(paths) if paths else np.zeros(0, dtype=np.int64)


def _strongest(masks: Masks, heat: Index, edges: int) -> tuple[Index, Index, Floats]:
    """Pairs of neurons (the lower first) that are among the most alike of one of the two, and how alike they are."""
    neurons = len(heat)
    found = []
    for first in range(0, neurons, BLOCK):
        last = min(neurons, first + BLOCK)
        both = _common(masks, first, last, neurons)
        either = heat[first:last, None].astype(np.float32) + heat[None].astype(np.float32) - both
        alike = both / np.maximum(either, 1)
        alike[np.arange(last - first), np.arange(first, last)] = 0
        keep = min(edges, neurons)
        other = np.argpartition(-alike, keep - 1, axis=1)[:, :keep]
        one = np.broadcast_to(np.arange(first, last)[:, None], other.shape)
        weight = np.take_along_axis(alike, other, axis=1)
        linked = weight > 0
        found.append((np.minimum(one, other)[linked], np.maximum(one, other)[linked], weight[linked]))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    one, other, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
    _, distinct = np.unique(one * neurons + other, return_index=True)
    return one[distinct], other[distinct], weight[distinct]


def _common(masks: Masks, first: int, last: int, neurons: int) -> Floats:
    """For how many tokens neurons first .. last were active together with each of all, `[last - first, neurons]`."""
    both = np.zeros((last - first, neurons), dtype=np.float32)
    for at in range(0, len(masks), SAMPLES):
        some = masks[at : at + SAMPLES]
        own = unpacked(some, first, last).astype(np.float32).T
        for start in range(0, neurons, BLOCK):
            stop = min(neurons, start + BLOCK)
            both[:, start:stop] += own @ unpacked(some, start, stop).astype(np.float32)
    return both


def _paths(neurons: int, one: Index, other: Index) -> list[Index]:
    """Take links in the order given where both neurons have an end free and no ring closes; every path there is."""
    parent = list(range(neurons))
    links: list[list[int]] = [[] for _ in range(neurons)]

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        if len(links[a]) < 2 and len(links[b]) < 2 and root(a) != root(b):
            parent[root(a)] = root(b)
            links[a].append(b)
            links[b].append(a)
    walks = [list(_walk(links, n)) for n in range(neurons) if len(links[n]) < 2]
    return [np.array(walk, dtype=np.int64) for walk in walks if walk[0] <= walk[-1]]


def _walk(links: list[list[int]], start: int) -> Iterator[int]:
    """The neurons of a path from one end."""
    before, here = -1, start
    while here >= 0:
        yield here
        before, here = here, next((n for n in links[here] if n != before), -1)


# -- regions by recursive bisection


@dataclass(frozen=True)
class _Firings:
    """Some neurons, and the tokens for which each was active: `tokens` holds `counts[i]` for `neurons[i]`, in turn."""

    neurons: Index
    counts: Index
    tokens: Index

    def split(self, right: Flags) -> tuple[_Firings, _Firings]:
        """Those that are not on the right, and those that are."""
        inside = np.repeat(right, self.counts)
        return (
            _Firings(self.neurons[~right], self.counts[~right], self.tokens[~inside]),
            _Firings(self.neurons[right], self.counts[right], self.tokens[inside]),
        )


def bisected_order(masks: Masks, neurons: int, *, bridge: int) -> Index:
    """Halve the neurons again and again, exchanging between the halves what makes reads cheaper; hot ones start left.

    The cost of d active neurons, spread evenly over n places, is what their reads take, in bundles: the hole behind
    each is read through up to `bridge`, and `bridge` is also what another read costs. With 1 it is the number of runs.

    Args:
        masks: of the tokens to learn from.
        neurons: of the layer.
        bridge: bundles whose transfer takes as long as another read. At least 1 is used.

    Raises:
        ValueError: the masks are not of so many neurons.
    """
    todo = [_firings(masks, hottest_first(masks, neurons))]
    done: list[Index] = [np.zeros(0, dtype=np.int64)]
    while todo:
        part = todo.pop()
        if len(part.neurons) < 3:
            done.append(part.neurons)
        else:
            left, right = part.split(_halves(part, len(masks), max(1, bridge)))
            todo += [right, left]
    return np.concatenate(done)


def _firings(masks: Masks, order: Index) -> _Firings:
    """The tokens of all neurons, which come in this order."""
    counts, tokens = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(order), BLOCK):
        some = order[first : first + BLOCK]
        active = (masks[:, some // 8].T >> (7 - some % 8).astype(np.uint8)[:, None]) & 1
        counts.append(active.sum(axis=1, dtype=np.int64))
        tokens.append(np.nonzero(active)[1])
    return _Firings(order, np.concatenate(counts), np.concatenate(tokens))


def _halves(part: _Firings, tokens: int, bridge: int) -> Flags:
    """Which neurons go to the right half."""
    n = len(part.neurons)
    right = np.arange(n) >= n // 2
    costs = (_costs(n // 2, bridge), _costs(n - n // 2, bridge))
    best, found = np.inf, right
    for _ in range(ROUNDS):
        total, gain = _gains(part, right, tokens, costs)
        if total >= best:
            break
        best, found = total, right
        swaps = _exchange(gain, right)
        if not swaps.size:
            break
        right = right.copy()
        right[swaps] = ~right[swaps]
    return found


def _costs(places: int, bridge: int) -> Wide:
    """What reads of 0 .. places active neurons take, in bundles; and one entry for a neuron that comes before one goes.

    A hole is as long as k with probability q ** k, q the share that is not active, and costs min(length, bridge):
    d * (q + q ** 2 + ... + q ** bridge) in all.
    """
    active = np.minimum(np.arange(places + 2), places)
    return np.asarray((places - active) * (1 - (1 - active / places) ** bridge))


def _gains(part: _Firings, right: Flags, tokens: int, costs: tuple[Wide, Wide]) -> tuple[float, Wide]:
    """The cost of all tokens' reads, and by how much it falls when each neuron changes sides."""
    side = np.repeat(right, part.counts)
    b = np.bincount(part.tokens[side], minlength=tokens)
    a = np.bincount(part.tokens, minlength=tokens) - b
    here = costs[0][a] + costs[1][b]
    to_right = here - costs[0][np.maximum(a - 1, 0)] - costs[1][b + 1]
    to_left = here - costs[0][a + 1] - costs[1][np.maximum(b - 1, 0)]
    each = np.concatenate((to_right, to_left))[part.tokens + tokens * side]
    sums = np.concatenate(([0.0], np.cumsum(each)))
    ends = np.cumsum(part.counts)
    return float(here.sum()), sums[ends] - sums[ends - part.counts]


def _exchange(gain: Wide, right: Flags) -> Index:
    """Neurons to change sides: best with best, a share of the pairs that gain together."""
    left, other = np.flatnonzero(~right), np.flatnonzero(right)
    left = left[np.argsort(-gain[left], kind="stable")]
    other = other[np.argsort(-gain[other], kind="stable")]
    pairs = min(len(left), len(other))
    # the sums of rounding errors must not pass for a gain
    promising = int(np.count_nonzero(gain[left[:pairs]] + gain[other[:pairs]] > 1e-6))
    count = int(np.ceil(promising * EXCHANGED))
    return np.concatenate((left[:count], other[:count]))
