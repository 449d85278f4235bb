"""Files opened for reads that leave the page cache alone, as far as the system allows."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashinfer.config import FILE_ALIGNMENT, STORE_ALIGNMENT
from flashinfer.errors import PlatformError, StoreError
from flashinfer.io.buffers import AlignedBuffer

# a store never names a symbolic link (docs/format.md); these flags are missing on Windows only
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_F_NOCACHE = 48  # <sys/fcntl.h> of macOS; Python names it only there
TRUNCATED = "file is shorter than the store says (truncated?)"


@dataclass(frozen=True)
class OpenFile:
    """One open file.

    `refusal` says why its reads are not direct, None when they are. A file whose reads are not direct has the
    alignment 4096, because the page cache can only be emptied of whole pages.
    """

    path: str
    fd: int
    alignment: int
    refusal: str | None

    def read(self, offset: int, view: memoryview) -> None:
        """Fill the view from `offset` on. A partial read is continued from the last aligned byte.

        Raises:
            OSError: the system's; without an errno when the file ends too early.
        """
        done, length = 0, len(view)
        while done < length:
            try:
                got = os.preadv(self.fd, [view[done:] if done else view], offset + done)
            except InterruptedError:
                continue
            end = done + got
            resume = end if end == length else end - end % self.alignment
            if resume <= done:
                raise OSError(TRUNCATED)
            done = resume
        if self.refusal is not None:
            self._forget_cached(offset, length)

    def _forget_cached(self, offset: int, length: int) -> None:
        if sys.platform == "linux":
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


def open_file(path: Path, *, direct: bool) -> OpenFile:
    """Open for direct reads where they work, else for buffered ones.

    Opening with O_DIRECT may succeed where reading fails, so both are tried. The unit is found by reading,
    too: 512 bytes at an offset, length and address that are odd multiples of 512, then 4096 (the kernel tells
    it by statx STX_DIOALIGN, which Python does not expose).

    Raises:
        StoreError: the file cannot be opened, or is a symbolic link.
        PlatformError: on Windows.
    """
    if sys.platform == "win32":
        raise PlatformError("stores are read with POSIX calls that Windows lacks; use Linux or macOS")
    try:
        if direct and sys.platform == "darwin":
            return _open_uncached_macos(path)
        if not direct:
            return _open_buffered(path, "direct reads were not asked for")
        if sys.platform != "linux":
            return _open_buffered(path, "this system has no direct reads")
        try:
            return _open_direct(path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return _open_buffered(path, f"{path.name} refused direct reads: {error.strerror}")
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}; check the path and its permissions") from error


def _open_buffered(path: Path, refusal: str) -> OpenFile:
    fd = os.open(path, _FLAGS)
    if sys.platform == "linux":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would cache what nobody asked for
    return OpenFile(str(path), fd, FILE_ALIGNMENT, refusal)


def _open_direct(path: Path) -> OpenFile:
    fd = os.open(path, _FLAGS | _O_DIRECT)
    try:
        return OpenFile(str(path), fd, _probe_alignment(fd), None)
    except BaseException:
        os.close(fd)
        raise


def _probe_alignment(fd: int) -> int:
    """The smaller of 512 and 4096 in which a direct read works. Raises OSError when neither does."""
    with AlignedBuffer(2 * FILE_ALIGNMENT) as buffer:
        with buffer.array.data as view, contextlib.suppress(OSError):
            if os.preadv(fd, [view[STORE_ALIGNMENT : 2 * STORE_ALIGNMENT]], STORE_ALIGNMENT) == STORE_ALIGNMENT:
                return STORE_ALIGNMENT
        with buffer.array.data as view:
            os.preadv(fd, [view[:FILE_ALIGNMENT]], 0)
    return FILE_ALIGNMENT


def _open_uncached_macos(path: Path) -> OpenFile:
    """F_NOCACHE takes any alignment, and bypasses the cache for whole pages only."""
    import fcntl

    fd = os.open(path, _FLAGS)
    fcntl.fcntl(fd, _F_NOCACHE, 1)
    return OpenFile(str(path), fd, FILE_ALIGNMENT, None)


def open_files(paths: Sequence[Path], *, direct: bool) -> list[OpenFile]:
    """Open all or none. Raises as `open_file`."""
    files: list[OpenFile] = []
    try:
        for path in paths:
            files.append(open_file(path, direct=direct))  # noqa: PERF401 - what is open must be closed on failure
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def describe(files: Sequence[OpenFile]) -> str:
    """One line: how these files are read, and why not directly where they are not."""
    refusals = list(dict.fromkeys(f.refusal for f in files if f.refusal is not None))
    unit = max((f.alignment for f in files), default=FILE_ALIGNMENT)
    if not refusals:
        how = "F_NOCACHE" if sys.platform == "darwin" else "O_DIRECT"
        return f"direct reads ({how}) in units of {unit} bytes, as found by a trial read"
    whose = "" if all(f.refusal for f in files) else "partly "
    kept = "dropped from the page cache afterwards" if sys.platform == "linux" else "left in the page cache"
    return f"{whose}buffered reads, {kept}, because {'; '.join(refusals)}"
