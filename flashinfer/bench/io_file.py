"""What a disk is measured on: a store, a file of the user's, or a new file of random bytes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flashinfer.config import COPY_CHUNK
from flashinfer.errors import DiskFullError, StoreError
from flashinfer.store import open_store
from flashinfer.units import format_size


@contextlib.contextmanager
def file_to_read(path: Path, file_size: int, progress: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The file to measure on: `path` itself, the neuron file of a store, or a new file in a directory.

    A new file holds random bytes (some devices store zeros without storing them) and is removed at the end.

    Raises:
        StoreError: there is no such path, or the store is damaged.
        DiskFullError: the directory has no room for `file_size` bytes.
    """
    if path.is_file():
        yield path.resolve()
    elif (path / "manifest.json").exists():
        store = open_store(path)
        yield store.path_of(store.manifest.neurons)
    elif path.is_dir():
        name = path / f".flashinfer-bench-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            progress(f"writing {format_size(file_size)} of random bytes to {path}")
            _write_random(name, file_size)
            yield name
        finally:
            name.unlink(missing_ok=True)
    else:
        raise StoreError(f"{path} does not exist; give a store, a file, or a directory to make a test file in")


def _write_random(path: Path, size: int) -> None:
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    if free < size + COPY_CHUNK:
        raise DiskFullError(
            f"{path.parent} has {format_size(free)} free, the test file needs {format_size(size)}; "
            "give a smaller --file-size or another directory"
        )
    rng = np.random.default_rng()
    with path.open("xb") as out:
        for start in range(0, size, COPY_CHUNK):
            out.write(rng.bytes(min(COPY_CHUNK, size - start)))
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
