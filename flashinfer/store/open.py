"""Opening a store: the manifest read and checked, every file there with its size, nothing followed outside."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer.errors import StoreError, StoreReadError
from flashinfer.quant import Codec, LlmInt8, codec_with
from flashinfer.store.calibration import SECTION, Calibration, decode_calibration, weights_id
from flashinfer.store.geometry import Geometry
from flashinfer.store.manifest import MANIFEST_NAME, FileEntry, Manifest
from flashinfer.store.parse import decode_manifest
from flashinfer.store.roles import outliers_role

LARGEST_MANIFEST = 256 * 1024 * 1024
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CHECKPOINT_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Store:
    """An opened weight store: where it is, and its checked manifest. Holds no file open."""

    root: Path
    manifest: Manifest

    def path_of(self, entry: FileEntry) -> Path:
        """Where a file of the manifest lies."""
        return self.root / entry.name

    def geometry(self, layer: int) -> Geometry:
        """Record geometry of a layer; reads its permutation, if it has one.

        Raises:
            StoreError: the permutation does not name each neuron once.
            StoreReadError: it cannot be read.
        """
        n = self.manifest.layers[layer]
        position_of, experts = None, self.manifest.facts.routed(layer)
        if n.permutation is not None:
            order = self.read_tensor(n.permutation).astype(np.int64)
            position_of = _inverse(order, f"{self.root}: {n.permutation}")
        unit = 0 if experts is None else experts.size
        return Geometry(n.neurons, n.bundles_per_record, n.record_bytes, n.bundle_bytes, n.offset, position_of, unit)

    def read_tensor(self, role: str) -> npt.NDArray[np.float32] | npt.NDArray[np.int32]:
        """A whole tensor as float32 (int32 for a permutation), in its shape: for small tensors and tests.

        Raises:
            StoreReadError: it cannot be read.
        """
        t = self.manifest.tensors[role]
        data = np.frombuffer(self.read_range(self.manifest.file_of(t), t.offset, t.bytes), dtype=np.uint8)
        if t.codec == "i32":
            return data.view("<i4").astype(np.int32, copy=False)
        rows = data.reshape(t.shape[0] if len(t.shape) == 2 else 1, -1)
        return self.codec(role).decode(rows, t.shape[-1]).reshape(t.shape)

    def codec(self, role: str) -> Codec:
        """The codec of a tensor of matrix values; of `llm.int8` it reads the outlier columns.

        Raises:
            StoreError: they are none that can be. StoreReadError: they cannot be read.
        """
        t = self.manifest.tensors[role]
        outliers = outliers_role(role)
        if t.codec != LlmInt8.name or outliers is None:
            return codec_with(t.codec, ())
        columns = self.read_tensor(outliers).tolist()
        return outlier_codec(columns, t.shape[1], f"{self.root}: {outliers}")

    def calibration(self) -> Calibration | None:
        """What `calibrate` learnt about this model, None where it was never run.

        Raises:
            StoreError: the section is damaged.
            StoreReadError: it cannot be read.
        """
        entry = self.manifest.sections.get(SECTION)
        if entry is None:
            return None
        data, where = self.read_range(entry, 0, entry.bytes), str(self.path_of(entry))
        if xxhash.xxh3_128_hexdigest(data) != entry.xxh3:
            raise StoreError(f"{where} does not match its checksum; run `flashinfer calibrate` again")
        found = decode_calibration(data, self.manifest.facts, where)
        if found.weights != weights_id(self.manifest):
            raise StoreError(
                f"{where} was made for other weights (of another store, or of this one before it was changed); "
                "run `flashinfer calibrate` again"
            )
        return found

    def read_range(self, entry: FileEntry, offset: int, length: int) -> bytes:
        """Plain positional read of `length` bytes of a file. Raises StoreReadError where they are not all there."""
        path = self.path_of(entry)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                data = bytearray()
                while len(data) < length and (piece := os.pread(fd, length - len(data), offset + len(data))):
                    data += piece
            finally:
                os.close(fd)
        except OSError as e:
            raise StoreReadError(str(path), offset, length, e.strerror or str(e)) from e
        if len(data) != length:
            raise StoreReadError(str(path), offset, length, f"the file ends after {len(data)} bytes of them")
        return bytes(data)


def outlier_codec(columns: Sequence[int], width: int, where: str) -> Codec:
    """`llm.int8` with these outlier columns of a matrix of `width` columns; `where` names them in errors. Raises
    StoreError where they are not ascending columns of it."""
    if any(a >= b for a, b in pairwise((-1, *columns, width))):
        raise StoreError(f"{where} are not ascending columns below {width}; the store is damaged: pack it again")
    return LlmInt8(tuple(columns))


def open_store(path: str | Path) -> Store:
    """Open the weight store at `path`, checking all that `docs/format.md` asks of a reader.

    Raises:
        StoreError: there is no store, or it is damaged, half-written or too new; says which.
    """
    root = Path(path)
    if not root.is_dir():
        raise StoreError(_not_a_directory(root))
    manifest = read_manifest(root)
    check_sizes(root, manifest)
    return Store(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """The checked manifest of the store at `root`. Raises StoreError."""
    name = root / MANIFEST_NAME
    if not name.exists():
        raise StoreError(_no_manifest(root))
    size = _regular_size(name)
    if size > LARGEST_MANIFEST:
        raise StoreError(f"{name} has {size} bytes, more than any manifest; the store is damaged: pack it again")
    try:
        return decode_manifest(name.read_bytes(), str(name))
    except OSError as e:
        raise StoreReadError(str(name), 0, size, e.strerror or str(e)) from e


def check_sizes(root: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there, a regular file of its size. Raises StoreError for the first that is not."""
    for entry in manifest.files():
        found = _regular_size(root / entry.name)
        if found != entry.bytes:
            raise StoreError(
                f"{root / entry.name} has {found} bytes, the manifest says {entry.bytes}: "
                "the file was cut or changed; pack the checkpoint again"
            )


def hub_hint(path: str) -> str:
    """How to download `path`, where it looks like a hub name (`org/model`); empty where it does not."""
    if _HUB_NAME.fullmatch(path) is None:
        return ""
    return f"it looks like a hub name: download it first (`huggingface-cli download {path} --local-dir DIR`)"


def _regular_size(path: Path) -> int:
    """Size of a regular file. Raises StoreError for anything else, a symbolic link included."""
    try:
        status = path.lstat()
    except OSError as e:
        raise StoreError(f"{path} is missing or unreadable ({e.strerror}); pack the checkpoint again") from e
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"{path} is a symbolic link; a store holds only regular files: copy the file in its place")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file; pack the checkpoint again")
    return status.st_size


def _not_a_directory(root: Path) -> str:
    if root.exists():
        return f"{root} is a file; a weight store is a directory: give the one `flashinfer pack` wrote"
    if hint := hub_hint(str(root)):
        return f"{root} does not exist; {hint}, then run `flashinfer pack DIR STORE`"
    return f"{root} does not exist; make a store with `flashinfer pack CHECKPOINT {root}`"


def _no_manifest(root: Path) -> str:
    if any((root / name).exists() for name in _CHECKPOINT_FILES):
        return f"{root} is a checkpoint, not a weight store: run `flashinfer pack {root} STORE` first"
    return f"{root} has no {MANIFEST_NAME}: it is not a weight store, or was only half written; pack it again"


def _inverse(order: npt.NDArray[np.int64], where: str) -> npt.NDArray[np.int64]:
    """Where each neuron lies, from which neuron lies where."""
    count = len(order)
    valid = bool(((order >= 0) & (order < count)).all())
    if not valid or len(np.unique(order)) != count:
        raise StoreError(f"{where} is not a permutation; the store is damaged: pack it again")
    position_of = np.empty(count, dtype=np.int64)
    position_of[order] = np.arange(count)
    return position_of
