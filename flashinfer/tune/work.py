"""What a calibration has done so far, on disk beside the store's files, so that a killed one goes on where it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreError
from flashinfer.store.files import writing

NAME = ".calibrate"
"""Directory in the store; no manifest names it, so no reader looks at it."""


class Work:
    """A directory of intermediate results, made for one `key`: what another key left there is thrown away.

    Belongs to whoever holds the store's lock. A step is done once it is noted; its files were complete before that.
    """

    def __init__(self, store: Path, key: str) -> None:
        """Raises StoreError where it cannot be written to."""
        self.path = store / NAME
        state = self._load()
        self.resumed = state.get("key") == key and bool(state.get("done"))
        if state.get("key") != key:
            self.remove()
            state = {"key": key, "done": {}}
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        self._state: dict[str, Any] = state
        self._save()

    def done(self, step: str) -> Any | None:
        """What was noted when the step ended; None where it has not."""
        return self._state["done"].get(step)

    def note(self, step: str, result: Any = True) -> None:
        """The step has ended, with this result (plain values)."""
        self._state["done"][step] = result
        self._save()

    def keep(self, name: str, **arrays: Any) -> None:
        """Write arrays under a name; they are on the disk when it returns. Raises StoreError, DiskFullError."""
        path = self._arrays(name)
        with writing(path), path.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def kept(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """What was kept under a name. Raises StoreError: it is gone, or damaged."""
        path = self._arrays(name)
        try:
            with np.load(path) as data:
                return dict(data)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise StoreError(f"{path}, kept for later by a calibration, cannot be read ({e}); calibrate again") from e

    def remove(self) -> None:
        """Throw everything away."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _arrays(self, name: str) -> Path:
        return self.path / f"{name}.npz"

    def _load(self) -> dict[str, Any]:
        try:
            state = msgspec.json.decode((self.path / "state.json").read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}
        return state if isinstance(state, dict) and isinstance(state.get("done"), dict) else {}

    def _save(self) -> None:
        path, temporary = self.path / "state.json", self.path / "state.json.tmp"
        with writing(path):
            with temporary.open("wb") as file:
                file.write(msgspec.json.encode(self._state))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)


def work_bytes(store: Path) -> int:
    """Bytes that an interrupted calibration left there: the next one has them, or throws them away."""
    path = store / NAME
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def check_writable(store: Path) -> None:
    """Raises StoreError where nothing can be written beside the store's files."""
    if not os.access(store, os.W_OK):
        raise StoreError(f"{store} cannot be written to, and calibration changes the store; copy it to another place")
