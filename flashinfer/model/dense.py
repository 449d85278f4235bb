"""Dense weights: resident where the plan says so, else streamed in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.backend import Backend, Buffer
from flashinfer.config import TILE_ROWS, TILE_TOKENS
from flashinfer.errors import StoreError
from flashinfer.io import AlignedBuffer, RangePlan, Reader, plan_range
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.arena import Arena, Bytes
from flashinfer.model.reads import Reads
from flashinfer.model.stream import Piece, Stream
from flashinfer.model.uploads import Uploads
from flashinfer.quant import Codec, LlmInt8, codec_named
from flashinfer.speed import multiplied
from flashinfer.store import Manifest, TensorEntry, use_order
from flashinfer.store.open import outlier_codec
from flashinfer.store.roles import outliers_role

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

    A matrix that is not resident is streamed in blocks of whole row tiles (`pieces`, `read_from`). Where there is a
    device (`uploads`), each is on it, or is copied there in such blocks, from the host's memory or from the stream.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: Reader,
        backend: Backend,
        plan: Plan,
        ledger: Ledger,
        max_extent: int,
        arena: Arena,
        uploads: Uploads | None = None,
    ) -> None:
        self._tensors, self._backend, self._arena, self._uploads = manifest.tensors, backend, arena, uploads
        self._reads = {name: Reads(reader, number, name, ledger) for name, number in FILES.items()}
        self._alignment, self._manifest = reader.alignment, manifest
        self._max_extent, self._budget = max_extent, plan.piece
        self._vectors = {
            n: self._load_vector(n) for n, t in self._tensors.items() if len(t.shape) == 1 and t.codec != "i32"
        }
        self._codecs = {role: self._codec(role) for role in self._tensors}
        self._resident, self._hosted = self._load_matrices(plan)
        streamed = [n for n in multiplied(manifest) if n not in plan.kept]
        # their own account of what is under way: rows that are looked up do not wait for it
        stream = {name: Reads(reader, number, name, ledger) for name, number in FILES.items()}
        order = sorted(use_order(manifest), key=lambda role: role == "embed.weight")  # last where it is the head
        self._blocks = {name: self._split(name, stream[self._tensors[name].file]) for name in order if name in streamed}
        self._stream: Stream | None = None

    def pieces(self) -> dict[str, list[Piece]]:
        """What is streamed, by matrix, in order of use."""
        return {role: [block.piece for block in blocks] for role, blocks in self._blocks.items()}

    def read_from(self, stream: Stream) -> None:
        """Where the pieces come from: a stream through the arena's ring."""
        self._stream = stream

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
        if role in self._hosted:
            for first, rows, raw in self._parts(role, self._hosted[role]):
                yield first, self._matrix(role, rows, raw)
            return
        assert self._stream is not None
        for block in self._blocks[role]:
            start = self._arena.ring + self._stream.take(block.piece.key) + block.place
            yield block.first, self._matrix(role, block.rows, self._arena.bytes[start : start + block.piece.useful])
            if self._uploads is not None:
                self._uploads.wait()  # from here on the piece is written to
        self._stream.release()

    def _matrix(self, role: str, rows: int, raw: Bytes) -> Buffer:
        """Some rows of a matrix that lie in the host's memory, for one use."""
        there = raw if self._uploads is None else self._uploads.passing(raw)
        return self._backend.matrix(there, self._codecs[role], rows, self._tensors[role].shape[1], keep=False)

    def _parts(self, role: str, raw: Bytes) -> Iterator[tuple[int, int, Bytes]]:
        """A matrix in parts of as many whole row tiles as pass to the device at once: first row, rows, bytes."""
        assert self._uploads is not None
        total = self._tensors[role].shape[0]
        width = len(raw) // total
        step = _whole_tiles(self._uploads.arena.half // width, total)
        for first in range(0, total, step):
            rows = min(step, total - first)
            yield first, rows, raw[first * width : (first + rows) * width]

    def lookup(self, role: str, ids: Index) -> npt.NDArray[np.float32]:
        """Rows `[len(ids), cols]` as float32, a tile of TILE_TOKENS at a time; each is read once."""
        ids, place = np.unique(ids, return_inverse=True)
        out = np.empty((len(ids), self._tensors[role].shape[1]), dtype=np.float32)
        for t in range(0, len(ids), TILE_TOKENS):
            some = ids[t : t + TILE_TOKENS]
            out[t : t + len(some)] = self._rows(role, some)
        return out[place]

    def _rows(self, role: str, ids: Index) -> npt.NDArray[np.float32]:
        if role in self._resident:
            return self._backend.rows(self._resident[role], ids)
        tensor = self._tensors[role]
        if role not in self._hosted:
            return self._read_rows(tensor, ids)
        codec = self._codecs[role]
        found = codec_named(codec) if isinstance(codec, str) else codec
        return found.decode(self._hosted[role].reshape(tensor.shape[0], -1)[ids], tensor.shape[1])

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
        self._hosted.clear()

    def _split(self, role: str, reads: Reads) -> list[_Block]:
        """A matrix in blocks of as many whole row tiles as a piece holds; one of less than a row tile is a block."""
        tensor = self._tensors[role]
        width = tensor.bytes // tensor.shape[0]
        most = self._budget - 2 * self._alignment
        most = most if self._uploads is None else min(most, self._uploads.arena.half)
        fit = _whole_tiles(most // width, tensor.shape[0])
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
        buffer = AlignedBuffer(self._range(tensor.offset, tensor.bytes).extents.total)
        raw = self._read_part(role, 0, tensor.bytes, buffer.array)
        self._check(role, xxhash.xxh3_128_hexdigest(raw.data))
        return buffer, raw

    def _read_part(self, role: str, start: int, length: int, target: Bytes) -> Bytes:
        """So many bytes from there on of a tensor, read into `target`, of which they are a view."""
        tensor = self._tensors[role]
        plan, reads = self._range(tensor.offset + start, length), self._reads[tensor.file]
        reads.wait(reads.submit(plan.extents, target[: plan.extents.total], length))
        return target[plan.place : plan.place + length]

    def _check(self, role: str, digest: str) -> None:
        tensor = self._tensors[role]
        if digest != tensor.xxh3:
            raise StoreError(
                f"tensor {role} of {self._manifest.file_of(tensor).name} does not match its checksum; the file is "
                "damaged: run `flashinfer verify` on the store, then pack it again"
            )

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

    def _load_matrices(self, plan: Plan) -> tuple[dict[str, Buffer], dict[str, Bytes]]:
        """What stays: matrices where arithmetic has its memory, and bytes that are copied to a device when needed. On
        a CPU a matrix is a view of the memory the disk wrote to, and keeps it."""
        here = {role: self._read(role)[1] for role in sorted(plan.resident)}
        if self._uploads is None:
            return {role: self._kept(role, raw) for role, raw in here.items()}, {}
        for raw in here.values():
            self._uploads.pin(raw)
        return {role: self._kept(role, self._load_device(role)) for role in self._uploads.arena.matrices}, here

    def _kept(self, role: str, raw: Any) -> Buffer:
        return self._backend.matrix(raw, self._codecs[role], *self._tensors[role].shape, keep=True)

    def _load_device(self, role: str) -> Any:
        """A whole tensor, checked, on the device; it comes through the read buffers, which nothing uses yet."""
        assert self._uploads is not None
        target, digest = self._arena.bytes[self._arena.staging :], xxhash.xxh3_128()
        size, at = self._tensors[role].bytes, self._uploads.arena.matrices[role]
        step = len(target) - 2 * self._alignment
        for start in range(0, size, step):
            raw = self._read_part(role, start, min(step, size - start), target)
            digest.update(raw.data)
            self._uploads.staying(at + start, raw)
        self._check(role, digest.hexdigest())
        return self._uploads.arena.memory[at : at + size]


def _whole_tiles(rows: int, total: int) -> int:
    """All rows of a matrix where so many are as many, else as many whole row tiles."""
    return total if rows >= total else rows // TILE_ROWS * TILE_ROWS
