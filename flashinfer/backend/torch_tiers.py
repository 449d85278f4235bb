"""A cache of two tiers in operations on tensors: see `bookkeeping.Bookkeeping`; its twin is `cache.tiers.TieredCache`.

All shapes are fixed and nothing looks at a value, so that a step can be recorded once and replayed (`torch_graphs`).
Lists of unknown length are made by running sums: who is chosen goes to the place that the sum says, others to one
beyond the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashinfer.backend.base import Index
from flashinfer.backend.bookkeeping import Tiers
from flashinfer.backend.torch_graphs import Graphs, Replayed
from flashinfer.backend.torch_weights import there
from flashinfer.config import TILE_NEURONS

HEAD = 256
"""Rows that come to the host with their number; more come after."""


class TensorTiers:
    """See `bookkeeping.Bookkeeping`."""

    def __init__(self, tiers: Tiers, device: torch.device, graphs: Graphs) -> None:
        self._t, self._device, c = tiers, device, tiers.counting
        records, neurons = tiers.records, len(tiers.record_of)
        self._slot = self._full(records, -1)
        self._stamp = self._full(records, -1)
        self._score = torch.full((records,), -torch.inf, device=device)
        self._fresh = torch.zeros(records, dtype=torch.bool, device=device)
        self._ring = torch.zeros(tiers.window, records, dtype=torch.bool, device=device)
        self._tokens: deque[tuple[int, int]] = deque()  # stamp, row of the ring
        self._clock = self._row = 0
        self._numbers = torch.arange(max(records, neurons, tiers.near + tiers.far), device=device)
        self._tie = c.most_records - 1 - self._numbers[:records]
        self._added = torch.from_numpy(c.added).to(device)
        self._record_of, self._within = (torch.from_numpy(a).to(device) for a in (tiers.record_of, tiers.within))
        self._members = torch.from_numpy(_members(tiers)).to(device)
        self._flags = torch.zeros(neurons + 1, dtype=torch.bool, device=device)  # the last is nobody's
        self._when = torch.zeros(4, dtype=torch.float64, device=device)  # clock, first, now, row
        self._rows = self._full(records + 2, 0, 3)  # a head, and a place for those that are not listed
        self._tiles = self._full(-(-neurons // TILE_NEURONS) * TILE_NEURONS + 1, -1)
        self._graphs = graphs
        self._replayed = Replayed(self._choose, graphs)

    def slots(self) -> Index:
        """As `Bookkeeping.slots`."""
        return _host(self._slot)

    def window(self) -> list[Index]:
        """As `Bookkeeping.window`."""
        rows = self._ring.cpu().numpy()
        return [np.flatnonzero(rows[row]) for _, row in self._tokens]

    def effective_window(self) -> int:
        """As `Bookkeeping.effective_window`."""
        gone = (self._ring & (self._slot < 0)).any(dim=1).cpu().numpy()
        whole = 0
        for _, row in reversed(self._tokens):
            if gone[row]:
                break
            whole += 1
        return whole

    def preload(self, records: Index) -> Index:
        """As `Bookkeeping.preload`."""
        self._clock += 1
        needed, slots = self._mask(records), self.slots()
        free = np.setdiff1d(np.arange(self._t.near + self._t.far), slots[slots >= 0])[: len(records)]
        self._fresh |= needed
        self._use(needed, self._times())
        slots[records] = free
        self._slot.copy_(torch.from_numpy(slots))
        return free

    def step(self, needed: Index, recent: Sequence[Index]) -> Index:
        """As `Bookkeeping.step`."""
        last = list(recent[-self._t.window :]) if recent and self._t.window else []
        for active in (needed, *last):
            mask = self._mask(active)
            self._clock += 1
            if active is not needed or not last:
                self._remember(mask)
            self._use(mask, self._times())
        self._arrange(self._mask(needed), self._times())
        return self.answer()[0]

    def ask(self, flags: Tensor) -> None:
        """As `Bookkeeping.ask`."""
        self._graphs.mark()
        self._clock += 1
        self._flags[:-1].copy_(flags[0])
        self._remember(None)
        self._when.copy_(self._times())
        self._replayed()

    def wait(self) -> None:
        """As `Bookkeeping.wait`."""
        self._graphs.wait()

    def answer(self) -> tuple[Index, int, int]:
        """As `Bookkeeping.answer`."""
        head = _host(self._rows[: 1 + HEAD])
        count, neurons, records = head[0].tolist()
        rows = head[1 : 1 + count]
        more = _host(self._rows[1 + HEAD : 1 + count]) if count > HEAD else rows[:0]
        return np.concatenate((rows, more)), neurons, records

    def absent(self, flags: Tensor) -> Index:
        """As `Bookkeeping.absent`."""
        needed = torch.cat((flags[0], flags.new_zeros(1)))[self._members].any(dim=1)
        return np.flatnonzero((needed & (self._slot < 0)).cpu().numpy())

    def tiles(self, count: int) -> Tensor:
        """As `Bookkeeping.tiles`."""
        return self._tiles[: -(-count // TILE_NEURONS) * TILE_NEURONS].view(-1, TILE_NEURONS)

    def offsets(self, tiles: Tensor, base: int, size: int, records: Index, places: Index) -> Tensor:
        """As `Bookkeeping.offsets`."""
        at = self._slot * size + base
        if len(records):
            at[there(records, self._device)] = there(places, self._device)
        neurons = tiles.clamp(min=0)
        return torch.where(tiles >= 0, at[self._record_of[neurons]] + self._within[neurons], 0)

    # -- a step

    def _choose(self) -> None:
        """A step of the token that `_flags` and `_when` tell of. All it reads and writes stays where it is."""
        needed = self._flags[self._members].any(dim=1)
        if self._t.window:
            self._ring.index_copy_(0, self._when[3:].long(), needed[None])
        self._use(needed, self._when)
        self._arrange(needed, self._when)
        self._tile(self._flags[:-1])

    def _remember(self, mask: Tensor | None) -> None:
        """A token of the window more; of one without a mask the row is written later."""
        if not self._t.window:
            return
        if mask is not None:
            self._ring[self._row] = mask
        self._tokens.append((self._clock, self._row))
        self._row = (self._row + 1) % self._t.window
        if len(self._tokens) > self._t.window:
            self._tokens.popleft()

    def _times(self) -> Tensor:
        """This token's stamp, the one from which on a use is in the window, what a use now scores, and the window's
        newest row."""
        first, row = (self._tokens[0][0], self._tokens[-1][1]) if self._tokens else (self._clock + 1, 0)
        now = np.float32(self._clock / self._t.counting.half_life)
        return there(np.array([self._clock, first, now, row], dtype=np.float64), self._device)

    def _use(self, needed: Tensor, when: Tensor) -> None:
        """As `Heat.use`."""
        clock, now = when[0].long(), when[2].float()
        high, low = torch.maximum(self._score, now), torch.minimum(self._score, now)
        steps = ((high - low) * self._t.counting.steps).clamp(max=len(self._added) - 1)
        torch.where(needed, high + self._added[steps.long()], self._score, out=self._score)
        torch.where(needed, clock, self._stamp, out=self._stamp)

    def _arrange(self, needed: Tensor, when: Tensor) -> None:
        """Decide. Writes `_slot`, and `_rows` of who is listed."""
        slot, first = self._slot, when[1].long()
        held = slot >= 0
        near = held & (slot < self._t.near)
        far = held & ~near
        claim = self._claims(needed, held.long() + near, first, when[0].long())
        pool = self._staying(near | needed, needed, first)
        up = _best(claim, pool, self._t.near)
        down = _best(claim, self._staying((pool & ~up) | (far & ~needed), needed, first), self._t.far)
        self._fresh &= ~needed
        stays, absent = up | down, ~held
        rises, falls = up & far, down & near
        listed = rises | falls | (needed & ~near)
        order = torch.stack((rises, up & absent, falls, down & absent, listed)).cumsum(dim=1)
        new = self._given(order, torch.stack((rises, up & absent, falls, down & absent)), held & stays)
        new = torch.where(rises | falls | (stays & absent), new, slot.masked_fill(~stays, -1))
        place = (order[4] - 1).masked_fill(~listed, len(slot))
        self._rows[1:].index_copy_(0, place, torch.stack((self._numbers[: len(slot)], slot, new), dim=1))
        if len(slot):
            self._rows[0, 0].copy_(order[4, -1])
            self._rows[0, 2].copy_(needed.sum())
        self._slot.copy_(new)

    def _given(self, order: Tensor, takers: Tensor, occupied: Tensor) -> Tensor:
        """Slots for those who take one: rises and new ones near, falls and new ones far, so much for the rows of both.
        Free slots go first, then those that moves leave, in the order of the moves; who moves takes before who is new.

        Slots to be given lie in a row, those that are near from 0 on, the others from `near` on."""
        near, every, slot = self._t.near, self._t.near + self._t.far, self._slot
        free = torch.ones(every + 1, dtype=torch.bool, device=self._device)
        free.index_fill_(0, slot.masked_fill(~occupied, every), False)
        count = free.cumsum(dim=0)
        before = count[near - 1] if near else 0
        rank = count[:every] - 1
        rank[near:] += near - before
        supply = self._numbers.new_zeros(every + 1)
        supply.index_copy_(0, rank.masked_fill(~free[:every], every), self._numbers[:every])
        if not len(slot):
            return slot
        left = takers[2] * (order[2] + before) + takers[0] * (order[0] + (near + count[every - 1] - before))
        supply.index_copy_(0, (left - 1).masked_fill(~(takers[0] | takers[2]), every), slot)
        first = takers[0] * order[0] + takers[1] * (order[1] + order[0, -1])
        then = takers[2] * (order[2] + near) + takers[3] * (order[3] + (order[2, -1] + near))
        return supply[first + then - 1]

    def _staying(self, some: Tensor, needed: Tensor, first: Tensor) -> Tensor:
        """As `TieredCache._staying`."""
        return some if self._t.keeps else some & (needed | (self._stamp >= first) | self._fresh)

    def _claims(self, needed: Tensor, tier: Tensor, first: Tensor, clock: Tensor) -> Tensor:
        """As `cache.tiers.claims`."""
        c = self._t.counting
        age = (self._stamp - (first - 1)).clamp(min=0)
        age = torch.where(needed & (tier > 0), tier + (clock - first + 1), age)
        warm = (self._score * c.piles).clamp(min=-1, max=c.most_piles - 2).long() + 1
        return ((age * c.most_piles + warm) * 4 + tier) * c.most_records + self._tie

    def _tile(self, flags: Tensor) -> None:
        """These neurons in tiles. Writes `_tiles`, and how many they are."""
        count = flags.cumsum(dim=0)
        self._tiles.fill_(-1)
        self._tiles.index_copy_(0, (count - 1).masked_fill(~flags, len(self._tiles) - 1), self._numbers[: len(flags)])
        if len(flags):
            self._rows[0, 1].copy_(count[-1])

    def _full(self, size: int, value: int, *more: int) -> Tensor:
        return torch.full((size, *more), value, dtype=torch.int64, device=self._device)

    def _mask(self, records: Index) -> Tensor:
        found = np.zeros(self._t.records, dtype=bool)
        found[records] = True
        return torch.from_numpy(found).to(self._device)


def _host(values: Tensor) -> Index:
    found: Index = values.cpu().numpy().copy()
    return found


def _best(claim: Tensor, who: Tensor, count: int) -> Tensor:
    """Which of these are among the `count` with the best claims."""
    if count >= len(claim):
        return who
    if not count:
        return torch.zeros_like(who)
    least = claim.masked_fill(~who, -1).topk(count, sorted=False).values.amin()
    return who & (claim >= least)


def _members(tiers: Tiers) -> Index:
    """The neurons of each record, `[records, most]`; where there are fewer, one beyond the last."""
    counts = np.bincount(tiers.record_of, minlength=tiers.records)
    order = np.argsort(tiers.record_of, kind="stable")
    starts = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else counts
    found = np.full((tiers.records, max(1, int(counts.max(initial=1)))), len(tiers.record_of), dtype=np.int64)
    found[tiers.record_of[order], np.arange(len(order)) - starts[tiers.record_of[order]]] = order
    return found
