"""Weights of an opened store as bytes, in any order, wherever they lie: read once, checked, and not left in the cache.

Reads go through the page cache, and what was read is dropped from it. A region is read from end to end first, against
its checksum; then its rows are picked, from the cache as far as that holds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.config import COPY_CHUNK, PACK_BLOCK, TILE_ROWS, DiskCurve
from flashinfer.errors import StoreError, StoreReadError
from flashinfer.quant import Codec, codec_with
from flashinfer.store import FileEntry, Store
from flashinfer.store.neurons import Bytes, Chosen
from flashinfer.store.roles import ffn_role, outliers_role

Index = npt.NDArray[np.int64]


class Source:
    """The weights of a store. Use as a context manager: it keeps the dense and the neuron file open.

    Every method raises StoreReadError where the disk fails, and StoreError where a checksum does not hold.
    """

    def __init__(self, store: Store) -> None:
        self.manifest, self._store = store.manifest, store
        self.codecs: dict[str, str] = {}
        """By role, codecs that these bytes are in instead of those the manifest says."""
        self.outliers: dict[str, tuple[int, ...]] = {}
        """By their role, outlier columns of those among them that are `llm.int8`."""
        self._dense, self._neurons = _File(store, store.manifest.dense), _File(store, store.manifest.neurons)
        self._scratch = np.empty(COPY_CHUNK, dtype=np.uint8)
        self._layer, self._starts = -1, np.empty(0, dtype=np.int64)
        self._checked: dict[tuple[int, int], _File] = {}

    def codec(self, role: str) -> Codec:
        """What the bytes of a matrix come in; f32 for vectors. Raises StoreError, StoreReadError."""
        if role in self.codecs:
            return codec_with(self.codecs[role], self.outliers.get(outliers_role(role) or "", ()))
        if role in self.manifest.tensors:
            return self._store.codec(role)
        _, layer, _, part = role.split(".", 3)
        return codec_with(next(p.codec for p in self.manifest.layers[int(layer)].parts if p.role == part), ())

    def __enter__(self) -> Source:
        """Open the files."""
        self._dense.open()
        try:
            self._neurons.open()
        except BaseException:
            self._dense.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what they left in the page cache, and close them."""
        self._leave()
        self._dense.close()
        self._neurons.close()

    def tensor_chunks(self, role: str) -> Iterator[memoryview]:
        """A dense tensor from end to end, in pieces that the next one overwrites; not checked."""
        t = self.manifest.tensors[role]
        yield from self._pieces(self._dense, t.offset, t.bytes)

    def blocks(self, layer: int, wanted: Sequence[str]) -> Iterator[dict[str, Bytes]]:
        """As `parts`, of all neurons of a layer, some at a time, in their original order."""
        n = self.manifest.layers[layer]
        step = max(1, PACK_BLOCK // n.bundle_bytes)
        for start in range(0, n.neurons, step):
            yield self.parts(layer, slice(start, min(n.neurons, start + step)), wanted)

    def parts(self, layer: int, chosen: Chosen, wanted: Sequence[str]) -> dict[str, Bytes]:
        """These parts (`gate.weight`, `up.bias`, ...) of these neurons: each `[neurons, bytes]`, wherever it lies."""
        if layer != self._layer:
            self._leave()
            self._layer, self._starts = layer, self._bundle_starts(layer)
        inside = self.bundled(layer, chosen, wanted)
        return {p: inside[p] if p in inside else self.rows(ffn_role(layer, p), chosen) for p in wanted}

    def rows(self, role: str, chosen: Chosen) -> Bytes:
        """These rows of a dense matrix, or values of a vector: `[rows, bytes]`; checked."""
        t = self.manifest.tensors[role]
        self._check(self._dense, t.offset, t.bytes, t.xxh3, f"tensor {role}")
        width = t.bytes // t.shape[0]
        return self._gather(self._dense, (t.offset + width * np.arange(t.shape[0], dtype=np.int64))[chosen], width)

    def row_blocks(self, role: str) -> Iterator[tuple[int, Bytes]]:
        """A dense matrix in blocks of whole tiles of rows: the first row, and `[rows, bytes]`."""
        t = self.manifest.tensors[role]
        step = TILE_ROWS * max(1, PACK_BLOCK // (t.bytes // t.shape[0] * TILE_ROWS))
        for start in range(0, t.shape[0], step):
            yield start, self.rows(role, slice(start, start + step))

    def bundled(self, layer: int, chosen: Chosen, wanted: Sequence[str]) -> dict[str, Bytes]:
        """Those of the wanted parts that are in the bundles, `[neurons, bytes]`."""
        n = self.manifest.layers[layer]
        ends = [p.offset for p in n.parts[1:]] + [n.bundle_bytes]
        spans = {p.role: (p.offset, end) for p, end in zip(n.parts, ends, strict=True) if p.role in wanted}
        if not spans:
            return {}
        self._check(self._neurons, n.offset, n.bytes, n.xxh3, f"layer {layer} (neurons)")
        first, last = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
        rows = self._gather(self._neurons, self._starts[chosen] + first, last - first)
        return {role: rows[:, a - first : b - first] for role, (a, b) in spans.items()}

    def _bundle_starts(self, layer: int) -> Index:
        """Where in the neuron file the bundle of each neuron begins, by original index."""
        g = self._store.geometry(layer)
        record, place = np.divmod(g.positions(np.arange(g.neurons)), g.bundles_per_record)
        starts: Index = g.offset + record * g.record_bytes + place * g.bundle_bytes
        return starts

    def _gather(self, file: _File, starts: Index, width: int) -> Bytes:
        """The `width` bytes from each start: `[starts, width]`. In order of the file, neighbours in one read."""
        out = np.empty((len(starts), width), dtype=np.uint8)
        if width > len(self._scratch):
            self._scratch = np.empty(width, dtype=np.uint8)
        places = np.argsort(starts, kind="stable")
        sorted_starts = starts[places]
        for first, last in _runs(sorted_starts, width, len(self._scratch)):
            begin = int(sorted_starts[first])
            file.read(begin, self._scratch[: int(sorted_starts[last - 1]) + width - begin])
            offsets = sorted_starts[first:last] - begin
            for place, at in zip(places[first:last].tolist(), offsets.tolist(), strict=True):
                out[place] = self._scratch[at : at + width]
        return out

    def _check(self, file: _File, offset: int, length: int, xxh3: str, what: str) -> None:
        """Hold a region of this layer against its checksum, once."""
        if self._checked.get((offset, length)) is file:
            return
        digest = xxhash.xxh3_128()
        for piece in self._pieces(file, offset, length, keep=True):
            digest.update(piece)
        if digest.hexdigest() != xxh3:
            raise damaged(what, file.path)
        self._checked[offset, length] = file

    def _pieces(self, file: _File, offset: int, length: int, keep: bool = False) -> Iterator[memoryview]:
        """A stretch of a file from end to end; `keep` leaves it in the page cache."""
        end = offset + length
        for start in range(offset, end, COPY_CHUNK):
            piece = self._scratch[: min(COPY_CHUNK, end - start)]
            file.read(start, piece)
            yield piece.data
            if not keep:
                file.drop(start, len(piece))

    def _leave(self) -> None:
        """Done with a layer: drop from the page cache what was read of it."""
        for (offset, length), file in self._checked.items():
            file.drop(offset, length)
        self._checked.clear()


class _File:
    """A file of the store, read by position."""

    def __init__(self, store: Store, entry: FileEntry) -> None:
        self.path: Path = store.path_of(entry)
        self._fd = -1

    def open(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise StoreReadError(str(self.path), 0, 0, e.strerror or str(e)) from e

    def read(self, offset: int, out: Bytes) -> None:
        """Fill `out` from `offset`."""
        view = out.data
        while view:
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as e:
                raise StoreReadError(str(self.path), offset, len(view), e.strerror or str(e)) from e
            if got == 0:
                raise StoreReadError(str(self.path), offset, len(view), "the file ends before them")
            view, offset = view[got:], offset + got

    def drop(self, offset: int, length: int) -> None:
        """Take a stretch out of the page cache, where the system takes such hints."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def damaged(what: str, path: Path) -> StoreError:
    """The error for a region that does not match its checksum."""
    return StoreError(
        f"{what} of {path} does not match its checksum; the file is damaged: "
        "run `flashinfer verify` on the store, then pack it again"
    )


def _runs(starts: Index, width: int, limit: int) -> Iterator[tuple[int, int]]:
    """Sorted starts in runs `[first, last)` worth one read each: no wide hole inside, at most `limit` bytes."""
    holes = np.flatnonzero(np.diff(starts) > width + DiskCurve().break_even_gap) + 1
    first = 0
    for end in [*holes.tolist(), len(starts)]:
        while first < end:
            last = min(end, int(np.searchsorted(starts, starts[first] + limit - width, side="right")))
            yield first, last
            first = last
