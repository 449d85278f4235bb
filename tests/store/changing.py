"""A change to a store, and what may lie in its directory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flashinfer.store import Manifest, Store, StoreUpdate, open_store, verify
from tests.store.predicted import calibration_for

TEXT = "config.json"


def change(store: Store, text: bytes = b"{}") -> Manifest:
    """A change that adds a file, replaces one and keeps the rest; the manifest that was committed."""
    with StoreUpdate(store) as update:
        with update.create("text", f"-{TEXT}") as file:
            file.write(text)
        section = update.write_calibration(calibration_for(), store.manifest)
        manifest = msgspec.structs.replace(
            store.manifest, text=store.manifest.text | {TEXT: update.entries[0]}, sections={"calibration": section}
        )
        update.commit(manifest)
    return manifest


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def expected_names(manifest: Manifest) -> set[str]:
    return {f.name for f in manifest.files()} | {"manifest.json", "lock"}


def is_sound(root: Path) -> bool:
    return verify(open_store(root)) == []
