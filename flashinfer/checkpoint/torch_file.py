"""One PyTorch file (`.bin`, `.pt`): a zip; its `data.pkl` describes the tensors, the other entries are their bytes."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.raw import Place, RawFile
from flashinfer.checkpoint.torch_pickle import View, read_state_dict
from flashinfer.errors import CheckpointError

LARGEST_PICKLE = 64 << 20
"""Bytes; that of a model of 100,000 tensors has 20 MB."""
_LOCAL_HEADER = 30
"""Bytes before an entry's name and extra field, whose lengths are its last four."""


class TorchFile(RawFile):
    """An open PyTorch file, read without torch and without running what its pickle asks for.

    Raises:
        CheckpointError: it cannot be opened, is of the format before PyTorch 1.6, damaged, or would run code.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _parse)


def _parse(path: Path, fd: int) -> dict[str, Place]:
    with os.fdopen(os.dup(fd), "rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise CheckpointError(_not_zip(path, fd))
        try:
            with zipfile.ZipFile(stream) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                views = read_state_dict(_read_pickle(archive, entries))
                order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as e:
            raise CheckpointError(f"{path} is a damaged PyTorch file ({e}); download it again") from e
        except ValueError as e:
            raise CheckpointError(f"{path} cannot be read: {e}; get the checkpoint as safetensors") from e
    if order != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; get the checkpoint as safetensors")
    size = os.fstat(fd).st_size
    return {name: _place(path, fd, name, view, entries, size) for name, view in views.items()}


def _not_zip(path: Path, fd: int) -> str:
    match os.pread(fd, 2, 0):
        case b"PK":
            return f"{path} was cut short; download it again"
        case b"\x80\x02":
            return (
                f"{path} is of the format before PyTorch 1.6; convert it: "
                "torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
    return f"{path} is no PyTorch file; download it again"


def _read_pickle(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> bytes:
    info = entries.get("data.pkl")
    if info is None or info.file_size > LARGEST_PICKLE:
        raise ValueError("it has no data.pkl" if info is None else f"its data.pkl has {info.file_size} bytes")
    with archive.open(info) as stream:
        return stream.read(LARGEST_PICKLE)


def _place(path: Path, fd: int, name: str, view: View, entries: dict[str, zipfile.ZipInfo], size: int) -> Place:
    """Where the view's bytes lie in the file, every bound checked."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise CheckpointError(f"tensor {name[:200]} of {path} {what}")

    storage, count = view.storage, math.prod(view.shape)
    info = entries.get(f"data/{storage.key}")
    need(info is not None, "has no data in the file; download it again")
    assert info is not None
    need(info.compress_type == zipfile.ZIP_STORED, "is compressed; save it with torch.save, which does not compress")
    need(info.file_size == storage.count * storage.itemsize, "has data of another length; download it again")
    need(view.offset + count <= storage.count, "reaches beyond its storage; download it again")
    transposed = not _contiguous(view.shape, view.stride)
    plain = not transposed or (len(view.shape) == 2 and _contiguous(view.shape[::-1], view.stride[::-1]))
    need(plain, f"has strides {list(view.stride)} for shape {list(view.shape)}; save it with .contiguous()")
    header = os.pread(fd, _LOCAL_HEADER, info.header_offset)
    need(header[:4] == b"PK\3\4" and len(header) == _LOCAL_HEADER, "lies in a damaged archive; download it again")
    start = info.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    need(start + info.file_size <= size, "lies outside the file; download it again")
    place = TensorInfo(name, storage.dtype, view.shape)
    return Place(place, start + view.offset * storage.itemsize, count * storage.itemsize, transposed)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether values lie in row-major order; the stride of a dimension of one does not matter."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True
