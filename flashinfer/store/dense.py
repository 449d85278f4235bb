"""The dense file, and the predictors file: aligned safetensors files, planned first, then written front to back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Literal

import msgspec
import xxhash

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.quant import codec_with
from flashinfer.store.files import HashedFile
from flashinfer.store.geometry import round_up
from flashinfer.store.manifest import NO_HASH, TensorEntry

VECTOR_ALIGNMENT = 64
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "i32": "I32"}


@dataclass(frozen=True)
class DenseTensor:
    """What goes into the file under a role: its codec, its shape, the checkpoint's name for it; of `llm.int8` how many
    outlier columns it has."""

    role: str
    codec: str
    shape: tuple[int, ...]
    source: str
    outliers: int = 0

    @property
    def bytes(self) -> int:
        """Encoded size."""
        rows, cols = (1, self.shape[0]) if len(self.shape) == 1 else self.shape
        return rows * (
            4 * cols if self.codec == "i32" else codec_with(self.codec, range(self.outliers)).row_bytes(cols)
        )


@dataclass(frozen=True)
class DensePlan:
    """Where every tensor will lie. `entries` are in file order, their checksums still `NO_HASH`."""

    header: bytes
    entries: dict[str, TensorEntry]
    bytes: int


def plan_dense(tensors: Sequence[DenseTensor], file: Literal["dense", "predictors"] = "dense") -> DensePlan:
    """Lay the tensors out in the order given, with the padding `docs/format.md` asks for; `file` is what they go to."""
    starts: list[int] = []
    end = 0
    for t in tensors:
        starts.append(round_up(end, FILE_ALIGNMENT if len(t.shape) == 2 else VECTOR_ALIGNMENT))
        end = starts[-1] + t.bytes
    size = round_up(end, FILE_ALIGNMENT)
    header = _header(tensors, starts, size)
    entries = {
        t.role: TensorEntry(t.codec, t.shape, len(header) + start, t.bytes, NO_HASH, t.source, file)
        for t, start in zip(tensors, starts, strict=True)
    }
    return DensePlan(header, entries, len(header) + size)


def _header(tensors: Sequence[DenseTensor], starts: Sequence[int], size: int) -> bytes:
    """The length word and the JSON, padded with spaces so that the data start at a multiple of 4096."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "role": "flashinfer-store"}}
    gaps = (f"padding.{n}" for n in count())
    for (t, start), (_, following) in pairwise([*zip(tensors, starts, strict=True), (None, size)]):
        assert t is not None
        end = start + t.bytes
        dtype = _DTYPES.get(t.codec, "U8")  # rows of bytes, where safetensors has no word for what they hold
        shape = list(t.shape) if t.codec in _DTYPES else [t.shape[0], t.bytes // t.shape[0]]
        table[t.role] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        if following > end:
            table[next(gaps)] = {"dtype": "U8", "shape": [following - end], "data_offsets": [end, following]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(round_up(8 + len(text), FILE_ALIGNMENT) - 8)
    return len(text).to_bytes(8, "little") + text


def write_dense(
    file: HashedFile, plan: DensePlan, chunks_of: Callable[[str], Iterable[memoryview]]
) -> dict[str, TensorEntry]:
    """Write the planned file; `chunks_of(role)` yields a tensor's bytes. Returns entries with checksums."""
    file.write(plan.header)
    done = {}
    for role, entry in plan.entries.items():
        file.pad_to(entry.offset)
        digest = xxhash.xxh3_128()
        for chunk in chunks_of(role):
            digest.update(chunk)
            file.write(chunk)
        assert file.position == entry.offset + entry.bytes, role
        done[role] = msgspec.structs.replace(entry, xxh3=digest.hexdigest())
    file.pad_to(plan.bytes)
    return done
