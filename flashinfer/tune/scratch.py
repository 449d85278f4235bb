"""Files without a name: what does not fit in memory waits there, and nothing of it is left however the process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from flashinfer.errors import DiskFullError
from flashinfer.store import Store
from flashinfer.store.files import writing
from flashinfer.units import format_size


def folders_for(store: Store) -> tuple[Path, ...]:
    """Where such a file may lie: beside the store, on a disk that is large enough for weights; else where the system
    keeps what is temporary, which may be memory."""
    return store.root.resolve().parent, Path(tempfile.gettempdir())


class UnnamedFile:
    """A file without a name, written and read by position. A context manager; its methods raise DiskFullError and
    StoreError."""

    def __init__(self, folders: Sequence[Path], size: int, what: str) -> None:
        """In the first of the folders that takes one. size: bytes it will have at most; where there is no room for
        them, the error says so of `what`."""
        self._where, self._file = _made(folders)
        free = shutil.disk_usage(self._where).free
        if size > free:
            self._file.close()
            raise DiskFullError(
                f"{what} take {format_size(size)} in {self._where}, where {format_size(free)} are free; "
                "give fewer --tokens, or free some space"
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (of bytes) from `offset`."""
        with writing(self._where):
            while data:
                done = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[done:], offset + done

    def read(self, offset: int, size: int) -> bytearray:
        """That many bytes from `offset`, which were written before."""
        data = bytearray()
        with writing(self._where):
            while len(data) < size:
                piece = os.pread(self._file.fileno(), size - len(data), offset + len(data))
                assert piece
                data += piece
        return data

    def __enter__(self) -> UnnamedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The file is gone. Idempotent."""
        self._file.close()


def _made(folders: Sequence[Path]) -> tuple[Path, IO[bytes]]:
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):
            return folder, tempfile.TemporaryFile(dir=folder, buffering=0)
    with writing(folders[-1]):
        return folders[-1], tempfile.TemporaryFile(dir=folders[-1], buffering=0)
