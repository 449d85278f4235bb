"""Files written once, hashed while they are written; locks, fsync, and what a full disk raises."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from flashinfer.errors import DiskFullError, StoreBusyError, StoreError
from flashinfer.store.manifest import FileEntry
from flashinfer.units import format_size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZEROS = bytes(1 << 16)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Map an OSError of the block to DiskFullError (no room, quota) or StoreError, both naming `path`."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise DiskFullError(
                f"the disk filled up while writing {path} ({e.strerror}); nothing was kept: "
                "free some space, then run again"
            ) from e
        raise StoreError(f"writing {path} failed: {e.strerror or e}; choose a directory that can be written to") from e


class HashedFile:
    """A new file, written front to back. `digest` and `position` follow every write.

    Use as a context manager; the file is closed, not synced, when the block ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._hash = xxhash.xxh3_128()
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. Raises DiskFullError, StoreError."""
        self._hash.update(data)
        view = memoryview(data).cast("B")
        self.position += len(view)
        with writing(self.path):
            while view:
                view = view[os.write(self._fd, view) :]

    def pad_to(self, position: int) -> None:
        """Append zeros up to `position`, which is not behind the current one."""
        assert position >= self.position
        while self.position < position:
            self.write(_ZEROS[: position - self.position])

    def sync(self) -> None:
        """Push the bytes to the device."""
        with writing(self.path):
            os.fsync(self._fd)

    @property
    def digest(self) -> str:
        """XXH3-128 of all bytes so far, 32 hex digits."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DataFiles:
    """Makes data files in a directory: each under a temporary name first, then under one that has its hash.

    `entries` are those made, in order. What makes stores and what changes them stand on it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: list[FileEntry] = []

    @contextlib.contextmanager
    def create(self, stem: str, suffix: str) -> Iterator[HashedFile]:
        """A new data file: when the block ends it is synced, named STEM-HASH and `suffix`, and in `entries`.

        A file of that very name and size that is there already is kept, and the new one dropped.
        """
        path = self.directory / f"{stem}{suffix}.tmp"
        with HashedFile(path) as file:
            yield file
            file.sync()
        name = self.directory / f"{stem}-{file.digest[:16]}{suffix}"
        with writing(path):
            if _has_size(name, file.position):
                path.unlink()
            else:
                path.rename(name)
        self.entries.append(FileEntry(name.name, file.position, file.digest))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def check_room(directory: Path, need: int) -> None:
    """Raises DiskFullError where fewer than `need` bytes are free to this user."""
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    if free < need:
        raise DiskFullError(
            f"{directory} has {format_size(free)} free, the store needs {format_size(need)}: "
            "free some space or choose another disk"
        )


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def lock_directory(path: Path) -> int:
    """Take the advisory lock on the file `lock` of a directory: a descriptor that holds it until closed.

    Raises:
        StoreBusyError: someone else holds it, or put another directory in its place meanwhile.
        StoreError: it cannot be taken at all.
    """
    name = path / "lock"
    busy = f"{path} is being written by another process; wait for it to end"
    with writing(name):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), os.lstat(name)):
                raise StoreBusyError(busy)
        except BlockingIOError as e:
            os.close(fd)
            raise StoreBusyError(busy) from e
        except BaseException:
            os.close(fd)
            raise
    return fd
