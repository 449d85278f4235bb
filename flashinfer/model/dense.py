"""Dense weights: resident where the plan says so, else streamed in large double-buffered reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.backend import Backend, Buffer
from flashinfer.config import TILE_ROWS, TILE_TOKENS
from flashinfer.errors import StoreError, StoreReadError
from flashinfer.io import AlignedBuffer, Pending, RangePlan, Reader, plan_range
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.quant import codec_named
from flashinfer.store import Manifest, TensorEntry

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
DENSE_FILE = 0
"""The dense file's place among the reader's files."""


@dataclass
class _InFlight:
    """A row block on its way into one half of the buffer."""

    role: str
    first: int
    rows: int
    half: int
    plan: RangePlan
    pending: Pending


class DenseWeights:
    """Vectors, matrices and tables of the dense file.

    Streaming: a matrix that is not resident is read in blocks of whole row tiles, the next block (or the first
    of the next streamed matrix in order of use) being in flight while the current one is computed with.
    """

    def __init__(
        self, manifest: Manifest, reader: Reader, backend: Backend, plan: Plan, ledger: Ledger, max_extent: int
    ) -> None:
        self._tensors, self._reader, self._backend, self._ledger = manifest.tensors, reader, backend, ledger
        self._file = manifest.dense.name
        self._max_extent = max_extent
        self._vectors = {
            n: self._load_vector(n) for n, t in self._tensors.items() if len(t.shape) == 1 and t.codec != "i32"
        }
        self._resident = {name: self._load_matrix(name) for name in sorted(plan.resident)}
        self._half = plan.dense_staging
        self._staging = AlignedBuffer(2 * self._half)
        order = sorted((t.offset, n) for n, t in self._tensors.items() if len(t.shape) == 2)
        tables = {"embed.positions", "embed.weight"}
        self._order = [n for _, n in order if n not in self._resident and n not in tables]
        if manifest.facts.tied_head and "embed.weight" not in self._resident:
            self._order.append("embed.weight")
        self._next: _InFlight | None = None
        self._unsettled: list[Pending] = []

    def vector(self, role: str) -> Buffer | None:
        """A resident vector, None where the model has none."""
        return self._vectors.get(role)

    def has(self, role: str) -> bool:
        """Whether the model has that tensor."""
        return role in self._tensors

    def rows_of(self, role: str) -> int:
        """Rows of a matrix."""
        return self._tensors[role].shape[0]

    def blocks(self, role: str) -> Iterator[tuple[int, Buffer]]:
        """See `model.weights.Weights.blocks`."""
        if role in self._resident:
            yield 0, self._resident[role]
            return
        tensor = self._tensors[role]
        current = self._take_prefetched(role) or self._submit(role, 0, 0)
        while True:
            self._next = self._submit_after(current)
            self._wait(current.pending)
            self._unsettled.remove(current.pending)
            start = current.half * self._half + current.plan.place
            raw = self._staging.array[start : start + current.rows * (tensor.bytes // tensor.shape[0])]
            yield current.first, self._backend.matrix(raw, tensor.codec, current.rows, tensor.shape[1], keep=False)
            if current.first + current.rows == tensor.shape[0]:
                return
            assert self._next is not None
            current = self._next

    def lookup(self, role: str, ids: Index) -> npt.NDArray[np.float32]:
        """Rows `[len(ids), cols]` as float32, a tile of TILE_TOKENS at a time."""
        out = np.empty((len(ids), self._tensors[role].shape[1]), dtype=np.float32)
        for t in range(0, len(ids), TILE_TOKENS):
            some = ids[t : t + TILE_TOKENS]
            resident = self._resident.get(role)
            out[t : t + len(some)] = (
                self._backend.rows(resident, some)
                if resident is not None
                else self._read_rows(self._tensors[role], some)
            )
        return out

    def _read_rows(self, tensor: TensorEntry, ids: Index) -> npt.NDArray[np.float32]:
        """One small read per row, all in flight at once."""
        width = tensor.bytes // tensor.shape[0]
        plans = [self._range(tensor.offset + int(i) * width, width) for i in ids]
        starts = np.cumsum([0, *(p.extents.total for p in plans)])
        with AlignedBuffer(int(starts[-1])) as buffer:
            waiting = [
                self._reader.submit(DENSE_FILE, p.extents, buffer.array[a:b])
                for p, a, b in zip(plans, starts[:-1], starts[1:], strict=True)
            ]
            for pending in waiting:
                self._wait(pending)
            rows = np.stack([buffer.array[a + p.place :][:width] for p, a in zip(plans, starts[:-1], strict=True)])
        self._account(int(starts[-1]), len(plans), len(ids) * width)
        return codec_named(tensor.codec).decode(rows)

    def close(self) -> None:
        """Drop the buffers; reads in flight are awaited first."""
        self._next = None
        self._settle()
        self._resident.clear()
        self._vectors.clear()
        self._staging.close()

    # -- streaming

    def _submit(self, role: str, first: int, half: int) -> _InFlight:
        tensor = self._tensors[role]
        width = tensor.bytes // tensor.shape[0]
        fit = (self._half - 2 * self._reader.alignment) // width // TILE_ROWS * TILE_ROWS
        rows = min(fit, tensor.shape[0] - first)
        plan = self._range(tensor.offset + first * width, rows * width)
        target = self._staging.array[half * self._half :][: plan.extents.total]
        pending = self._reader.submit(DENSE_FILE, plan.extents, target)
        self._unsettled.append(pending)
        self._account(plan.extents.total, len(plan.extents.offsets), rows * width)
        return _InFlight(role, first, rows, half, plan, pending)

    def _submit_after(self, current: _InFlight) -> _InFlight:
        """Start what will be wanted next: the rest of this matrix, or the next streamed one."""
        if current.first + current.rows < self.rows_of(current.role):
            return self._submit(current.role, current.first + current.rows, 1 - current.half)
        following = self._order[(self._order.index(current.role) + 1) % len(self._order)]
        return self._submit(following, 0, 1 - current.half)

    def _take_prefetched(self, role: str) -> _InFlight | None:
        """The first block of the matrix if it is on its way. All other reads end first, so that their halves may
        be used: a prefetch that nobody wants, and those of a stream that was abandoned (an error, Ctrl-C)."""
        found, self._next = self._next, None
        if found is not None and (found.role != role or found.first != 0):
            found = None
        self._settle(None if found is None else found.pending)
        return found

    def _settle(self, wanted: Pending | None = None) -> None:
        """Let all reads to the staging buffer end but the wanted one."""
        for pending in [p for p in self._unsettled if p is not wanted]:
            with contextlib.suppress(StoreReadError):
                self._wait(pending)
            self._unsettled.remove(pending)

    def _wait(self, pending: Pending) -> None:
        before = self._reader.stats.seconds_waiting
        try:
            pending.wait()
        finally:
            self._ledger.current.io_wait += self._reader.stats.seconds_waiting - before

    # -- loading

    def _range(self, start: int, length: int) -> RangePlan:
        return plan_range(start, length, alignment=self._reader.alignment, max_extent=self._max_extent)

    def _read(self, role: str) -> tuple[AlignedBuffer, Bytes]:
        """A whole tensor, checked: what stays for good is worth a pass of the hash over it."""
        tensor = self._tensors[role]
        plan = self._range(tensor.offset, tensor.bytes)
        buffer = AlignedBuffer(plan.extents.total)
        self._wait(self._reader.submit(DENSE_FILE, plan.extents, buffer.array))
        self._account(plan.extents.total, len(plan.extents.offsets), tensor.bytes)
        raw = buffer.array[plan.place : plan.place + tensor.bytes]
        if xxhash.xxh3_128_hexdigest(raw.data) != tensor.xxh3:
            raise StoreError(
                f"tensor {role} of {self._file} does not match its checksum; the file is damaged: "
                "run `flashinfer verify` on the store, then pack it again"
            )
        return buffer, raw

    def _load_vector(self, role: str) -> Buffer:
        buffer, raw = self._read(role)
        with buffer:
            return self._backend.vector(raw.view("<f4").copy())

    def _load_matrix(self, role: str) -> Buffer:
        """On a CPU the matrix is a view of the memory the device wrote to, and keeps it; elsewhere that is let go."""
        _, raw = self._read(role)
        return self._backend.matrix(raw, self._tensors[role].codec, *self._tensors[role].shape, keep=True)

    def _account(self, read: int, reads: int, useful: int) -> None:
        account = self._ledger.current
        account.bytes_read += read
        account.reads += reads
        account.useful_bytes += useful
