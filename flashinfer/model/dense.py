"""Dense weights: resident where the plan says so, else streamed in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.backend import Backend, Buffer
from flashinfer.config import TILE_ROWS, TILE_TOKENS
from flashinfer.errors import StoreError
from flashinfer.io import AlignedBuffer, RangePlan, Reader, plan_range
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.reads import Reads
from flashinfer.model.stream import Piece, Stream
from flashinfer.quant import Codec, LlmInt8, codec_named
from flashinfer.speed import multiplied
from flashinfer.store import Manifest, TensorEntry, use_order
from flashinfer.store.open import outlier_codec
from flashinfer.store.roles import outliers_role

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
FILES = {"dense": 0, "predictors": 2}
"""Places of the files with tensors among the reader's files."""
HEAD = frozenset({"project_out.weight", "embed.weight", "head.weight"})
"""Streamed matrices that only logits need (the embedding where it is the head, too)."""


@dataclass(frozen=True)
class _Block:
    """Rows first .. first + rows of a matrix, `place` bytes into their piece."""

    first: int
    rows: int
    place: int
    piece: Piece


class DenseWeights:
    """Vectors, matrices and tables of the dense file.

    A matrix that is not resident is streamed in blocks of whole row tiles (`pieces`, `read_from`).
    """

    def __init__(
        self, manifest: Manifest, reader: Reader, backend: Backend, plan: Plan, ledger: Ledger, max_extent: int
    ) -> None:
        self._tensors, self._backend = manifest.tensors, backend
        self._reads = {name: Reads(reader, number, name, ledger) for name, number in FILES.items()}
        self._alignment, self._manifest = reader.alignment, manifest
        self._max_extent, self._budget = max_extent, plan.piece
        self._vectors = {
            n: self._load_vector(n) for n, t in self._tensors.items() if len(t.shape) == 1 and t.codec != "i32"
        }
        self._codecs = {role: self._codec(role) for role in self._tensors}
        self._resident = {name: self._load_matrix(name) for name in sorted(plan.resident)}
        streamed = [n for n in multiplied(manifest) if n not in self._resident]
        # their own account of what is under way: rows that are looked up do not wait for it
        stream = {name: Reads(reader, number, name, ledger) for name, number in FILES.items()}
        order = sorted(use_order(manifest), key=lambda role: role == "embed.weight")  # last where it is the head
        self._blocks = {name: self._split(name, stream[self._tensors[name].file]) for name in order if name in streamed}
        self._memory, self._ring = np.empty(0, dtype=np.uint8), 0
        self._stream: Stream | None = None

    def pieces(self) -> dict[str, list[Piece]]:
        """What is streamed, by matrix, in order of use."""
        return {role: [block.piece for block in blocks] for role, blocks in self._blocks.items()}

    def read_from(self, stream: Stream, memory: Bytes, ring: int) -> None:
        """Where the pieces come from; the stream's bytes count from `ring` of the memory."""
        self._stream, self._memory, self._ring = stream, memory, ring

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
        assert self._stream is not None
        for block in self._blocks[role]:
            start = self._ring + self._stream.take(block.piece.key) + block.place
            raw = self._memory[start : start + block.piece.useful]
            yield block.first, self._backend.matrix(raw, self._codecs[role], block.rows, tensor.shape[1], keep=False)
        self._stream.release()

    def lookup(self, role: str, ids: Index) -> npt.NDArray[np.float32]:
        """Rows `[len(ids), cols]` as float32, a tile of TILE_TOKENS at a time; each is read once."""
        ids, place = np.unique(ids, return_inverse=True)
        out = np.empty((len(ids), self._tensors[role].shape[1]), dtype=np.float32)
        for t in range(0, len(ids), TILE_TOKENS):
            some = ids[t : t + TILE_TOKENS]
            resident = self._resident.get(role)
            out[t : t + len(some)] = (
                self._backend.rows(resident, some)
                if resident is not None
                else self._read_rows(self._tensors[role], some)
            )
        return out[place]

    def _read_rows(self, tensor: TensorEntry, ids: Index) -> npt.NDArray[np.float32]:
        """One small read per row, all in flight at once."""
        width, reads = tensor.bytes // tensor.shape[0], self._reads[tensor.file]
        plans = [self._range(tensor.offset + int(i) * width, width) for i in ids]
        starts = np.cumsum([0, *(p.extents.total for p in plans)])
        with AlignedBuffer(int(starts[-1])) as buffer:
            waiting = [
                reads.submit(p.extents, buffer.array[a:b], width)
                for p, a, b in zip(plans, starts[:-1], starts[1:], strict=True)
            ]
            for reading in waiting:
                reads.wait(reading)
            rows = np.stack([buffer.array[a + p.place :][:width] for p, a in zip(plans, starts[:-1], strict=True)])
        return codec_named(tensor.codec).decode(rows, tensor.shape[1])

    def close(self) -> None:
        """Drop the weights; reads in flight are awaited first."""
        for reads in self._reads.values():
            reads.settle()
        self._resident.clear()
        self._vectors.clear()
        self._memory = np.empty(0, dtype=np.uint8)

    def _split(self, role: str, reads: Reads) -> list[_Block]:
        """A matrix in blocks of as many whole row tiles as a piece holds; one of less than a row tile is a block."""
        tensor = self._tensors[role]
        width = tensor.bytes // tensor.shape[0]
        fit = (self._budget - 2 * self._alignment) // width
        fit = tensor.shape[0] if fit >= tensor.shape[0] else fit // TILE_ROWS * TILE_ROWS
        blocks = []
        for first in range(0, tensor.shape[0], fit):
            rows = min(fit, tensor.shape[0] - first)
            plan = self._range(tensor.offset + first * width, rows * width)
            piece = Piece((role, first), reads, plan.extents, rows * width, role in HEAD)
            blocks.append(_Block(first, rows, plan.place, piece))
        return blocks

    # -- loading

    def _range(self, start: int, length: int) -> RangePlan:
        return plan_range(start, length, alignment=self._alignment, max_extent=self._max_extent)

    def _read(self, role: str) -> tuple[AlignedBuffer, Bytes]:
        """A whole tensor, checked: what stays for good is worth a pass of the hash over it."""
        tensor = self._tensors[role]
        plan, reads = self._range(tensor.offset, tensor.bytes), self._reads[tensor.file]
        buffer = AlignedBuffer(plan.extents.total)
        reads.wait(reads.submit(plan.extents, buffer.array, tensor.bytes))
        raw = buffer.array[plan.place : plan.place + tensor.bytes]
        if xxhash.xxh3_128_hexdigest(raw.data) != tensor.xxh3:
            raise StoreError(
                f"tensor {role} of {self._manifest.file_of(tensor).name} does not match its checksum; the file is "
                "damaged: run `flashinfer verify` on the store, then pack it again"
            )
        return buffer, raw

    def _load_vector(self, role: str) -> Buffer:
        buffer, raw = self._read(role)
        with buffer:
            return self._backend.vector(raw.view("<f4").copy())

    def _codec(self, role: str) -> str | Codec:
        """What `Backend.matrix` is told: a name, or of `llm.int8` the codec with the matrix's outlier columns."""
        tensor, outliers = self._tensors[role], outliers_role(role)
        if tensor.codec != LlmInt8.name or outliers is None:
            return tensor.codec
        buffer, raw = self._read(outliers)
        with buffer:
            return outlier_codec(raw.view("<i4").tolist(), tensor.shape[1], outliers)

    def _load_matrix(self, role: str) -> Buffer:
        """On a CPU the matrix is a view of the memory the device wrote to, and keeps it; elsewhere that is let go."""
        _, raw = self._read(role)
        return self._backend.matrix(raw, self._codecs[role], *self._tensors[role].shape, keep=True)
