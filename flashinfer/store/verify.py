"""Every checksum of a store, in one sequential pass over each file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from flashinfer.config import COPY_CHUNK
from flashinfer.errors import StoreReadError
from flashinfer.store.manifest import FileEntry
from flashinfer.store.open import Store
from flashinfer.store.progress import Progress


@dataclass(frozen=True)
class Damage:
    """One region whose bytes are not those the manifest vouches for."""

    region: str
    file: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.region} is damaged: {self.length} bytes at offset {self.offset} of {self.file}"


@dataclass
class _Region:
    name: str
    offset: int
    length: int
    expected: str
    digest: Any = field(default_factory=xxhash.xxh3_128)

    def feed(self, start: int, chunk: memoryview) -> None:
        """Take what lies in the region of a chunk that begins at `start` of the file."""
        first, last = max(start, self.offset), min(start + len(chunk), self.offset + self.length)
        if first < last:
            self.digest.update(chunk[first - start : last - start])


def verify(store: Store, progress: Progress | None = None) -> list[Damage]:
    """Check every checksum; an empty list means the store is sound.

    Damaged regions come in file order, tensors and layers by name; a file whose regions are all sound but
    whose own checksum is not (padding, header) comes as the whole file.

    Raises:
        StoreReadError: the disk itself failed.
    """
    files = store.manifest.files()
    total = sum(f.bytes for f in files)
    done = 0
    damages: list[Damage] = []
    for entry in files:
        regions = _regions(store, entry)
        whole = xxhash.xxh3_128()
        for start, chunk in _chunks(store, entry):
            whole.update(chunk)
            for region in regions:
                region.feed(start, chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        bad = [r for r in regions if r.digest.hexdigest() != r.expected]
        damages += [Damage(r.name, entry.name, r.offset, r.length) for r in bad]
        if not bad and whole.hexdigest() != entry.xxh3:
            damages.append(Damage(f"file {entry.name}", entry.name, 0, entry.bytes))
    return damages


def _regions(store: Store, entry: FileEntry) -> list[_Region]:
    m = store.manifest
    if entry is m.neurons:
        return [_Region(f"layer {i} (neurons)", n.offset, n.bytes, n.xxh3) for i, n in enumerate(m.layers)]
    tensors = [(role, t) for role, t in m.tensors.items() if m.file_of(t) is entry]
    return [
        _Region(f"tensor {role}", t.offset, t.bytes, t.xxh3)
        for role, t in sorted(tensors, key=lambda item: item[1].offset)
    ]


def _chunks(store: Store, entry: FileEntry) -> Iterator[tuple[int, memoryview]]:
    """The file front to back in one reused buffer: (offset, bytes)."""
    path = store.path_of(entry)
    buffer = memoryview(bytearray(COPY_CHUNK))
    start = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            while got := os.preadv(fd, [buffer], start):
                yield start, buffer[:got]
                start += got
        finally:
            os.close(fd)
    except OSError as e:
        raise StoreReadError(str(path), start, COPY_CHUNK, e.strerror or str(e)) from e
