"""Changing a store: new data files beside the old ones, then one rename of the manifest. `docs/format.md` says how."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from flashinfer.errors import StoreError
from flashinfer.store.calibration import SECTION, Calibration, check_calibration, encode_calibration, weights_id
from flashinfer.store.files import DataFiles, HashedFile, check_room, lock_directory, sync_directory, writing
from flashinfer.store.manifest import MANIFEST_NAME, VERSION, FileEntry, Manifest, encode_manifest
from flashinfer.store.open import Store, check_sizes, read_manifest
from flashinfer.store.parse import decode_manifest

_NEW_MANIFEST = f"{MANIFEST_NAME}.tmp"
_KINDS = r"(dense|predictors)(-H)?\.safetensors|neurons(-H)?\.bin|calibration(-H)?\.json|text(-H)?-[A-Za-z0-9._-]+"
_OURS = re.compile(rf"({_KINDS.replace('(-H)?', '-[0-9a-f]{16}')})|({_KINDS.replace('(-H)?', '')})\.tmp")
"""Names of data files, with the hash when they are whole, and of those that were never finished."""


class StoreUpdate(DataFiles):
    """A change to an opened store, as a context manager: all of it is there after `commit`, or nothing of it.

    Mutates: the store's directory. It only adds files until the manifest is replaced; a running reader keeps what
    it opened. `need`: bytes the change takes on disk, at most, while old and new lie beside each other; where that
    turns out later, `require` checks it.
    """

    def __init__(self, store: Store, *, need: int = 0) -> None:
        super().__init__(store.root)
        self.store, self.need = store, need
        self._lock = -1

    def __enter__(self) -> StoreUpdate:
        """Take the lock, and remove what killed updates left.

        Raises:
            StoreBusyError: someone else is writing the store.
            StoreError: it is not the one that was opened any more, or cannot be written.
            DiskFullError: less than `need` bytes are free.
        """
        self._lock = lock_directory(self.directory)
        try:
            if read_manifest(self.directory) != self.store.manifest:
                raise StoreError(f"{self.directory} was changed by another process; open it again")
            _clean_up(self.directory)
            self.require(self.need)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not committed, whatever went wrong."""
        self._clean_up_later()
        self._release()

    def require(self, need: int) -> None:
        """Raises DiskFullError where fewer than `need` bytes are free."""
        check_room(self.directory, need)

    def commit(self, manifest: Manifest) -> None:
        """Make `manifest` the store's, in the current version of the format, and remove what it does not name.

        Raises:
            StoreError: it breaks the format, names what is not there, or cannot be written; the store is as it was,
                unless it is the last fsync that failed: then a power cut decides.
            DiskFullError: no room; the store is as it was.
        """
        data = encode_manifest(msgspec.structs.replace(manifest, version=VERSION))
        path = self.directory / _NEW_MANIFEST
        check_sizes(self.directory, decode_manifest(data, str(path)))
        with HashedFile(path) as file:
            file.write(data)
            file.sync()
        sync_directory(self.directory)  # the names of the data files, before anything refers to them
        with writing(path):
            path.rename(self.directory / MANIFEST_NAME)
        sync_directory(self.directory)
        self._clean_up_later()

    def write_calibration(self, calibration: Calibration, manifest: Manifest) -> FileEntry:
        """Write the calibration's file: what `sections["calibration"]` of the manifest to be committed names. It will
        hold for the weights of that manifest only.

        Raises:
            StoreError: it holds a value that no calibration of this model can, or cannot be written.
            DiskFullError: no room.
        """
        calibration = msgspec.structs.replace(calibration, weights=weights_id(manifest))
        check_calibration(calibration, self.store.manifest.facts, f"a new calibration of {self.directory}")
        with self.create(SECTION, ".json") as file:
            file.write(encode_calibration(calibration))
        return self.entries[-1]

    def _clean_up_later(self) -> None:
        """Clean up; what cannot be removed now is left to the next update."""
        with contextlib.suppress(StoreError, OSError):
            _clean_up(self.directory)

    def _release(self) -> None:
        lock, self._lock = self._lock, -1
        os.close(lock)


def _clean_up(directory: Path) -> None:
    """Remove data files of ours that the manifest in the directory does not name: one nobody reads any more, one that
    was never committed. Nothing else is touched. Whoever calls it holds the lock.

    It goes by the manifest that is there, not by what this process believes to have done: an interruption may come
    right after the rename.
    """
    named = {entry.name for entry in read_manifest(directory).files()}
    for path in list(directory.iterdir()):
        ours = path.name == _NEW_MANIFEST or _OURS.fullmatch(path.name) is not None
        if ours and path.name not in named and not path.is_dir():
            with writing(path):
                path.unlink()
