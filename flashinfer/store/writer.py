"""Making a new store: all of it in a temporary directory, then one rename. `docs/format.md` says the protocol."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashinfer.errors import StoreBusyError, StoreError
from flashinfer.store.files import DataFiles, HashedFile, check_room, lock_directory, sync_directory, writing
from flashinfer.store.manifest import MANIFEST_NAME, Manifest, encode_manifest


class StoreWriter(DataFiles):
    """A store in the making, as a context manager: it is whole after `commit`, or nothing is left of it.

    Mutates: the parent of `target` only. Before: `target` does not exist or is an empty directory; with
    `force` it may be a store, which stays untouched until the new one is whole.
    """

    def __init__(self, target: Path, *, need: int, force: bool = False) -> None:
        self.target = target.resolve()
        super().__init__(_temporary(self.target))
        self.need, self.force = need, force
        self._lock = -1

    def __enter__(self) -> StoreWriter:
        """Raises StoreError (target taken, no parent), StoreBusyError, DiskFullError (less than `need` bytes free)."""
        if not self.target.parent.is_dir():
            raise StoreError(f"{self.target.parent} is not a directory; make it first")
        _clean_up(self.target)
        self._check_target()
        check_room(self.target.parent, self.need)
        self._lock = _make_temporary(self.directory, self.target)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is not committed, whatever went wrong."""
        if self._lock >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._release()

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and move the store to its final name. Raises StoreError, DiskFullError."""
        with HashedFile(self.directory / MANIFEST_NAME) as file:
            file.write(encode_manifest(manifest))
            file.sync()
        sync_directory(self.directory)
        with _moved_away(self.target) if self.force else contextlib.nullcontext():
            with writing(self.target):
                self.directory.rename(self.target)
        self._release()
        sync_directory(self.target.parent)

    def _release(self) -> None:
        lock, self._lock = self._lock, -1
        os.close(lock)

    def _check_target(self) -> None:
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return
        if not self.force:
            raise StoreError(f"{self.target} already exists; choose another name, or replace it with --force")
        if not (self.target / MANIFEST_NAME).is_file():
            raise StoreError(
                f"{self.target} exists and is not a weight store, which is all --force replaces; choose another name"
            )


@contextlib.contextmanager
def _moved_away(target: Path) -> Iterator[None]:
    """Rename an old store aside while the new one takes its name; put it back if that fails, else remove it."""
    if not target.exists():
        yield
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    lock = lock_directory(target)
    try:
        with writing(target):
            target.rename(old)
        yield
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if target.exists():  # the new one is in place: an interruption does not take it back
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(target)
        raise
    finally:
        os.close(lock)


def _temporary(target: Path) -> Path:
    """Where this process makes the store that becomes `target`."""
    return target.with_name(f".{target.name}.tmp-{os.getpid()}")


def _make_temporary(path: Path, target: Path) -> int:
    """Make the directory `path` beside `target`, and lock it: the descriptor of its lock."""
    try:
        with writing(path):
            path.mkdir()
    except StoreError as e:
        if path.exists():
            raise StoreBusyError(f"{path} is in use: this process already writes {target}") from e
        raise
    try:
        return lock_directory(path)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _clean_up(target: Path) -> None:
    """Remove what dead writers to the same target left; put back an old store that lost its successor.

    A writer is dead when its lock is free. One that has not yet locked its directory is known by its PID.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d+)")
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if not (path / "lock").exists() and _alive(int(match[2])):
            continue
        with contextlib.suppress(StoreError):
            lock = lock_directory(path)
            if match[1] == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _alive(pid: int) -> bool:
    """Whether a process of that number exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
