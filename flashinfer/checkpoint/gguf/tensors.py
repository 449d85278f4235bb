"""The tensors of a GGUF file under its own names; those of quantised types are the float32 they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from flashinfer.checkpoint.base import Columns, TensorInfo, Words
from flashinfer.checkpoint.gguf.header import Header, TensorEntry, read_header
from flashinfer.checkpoint.raw import Place, RawFile, check_apart
from flashinfer.errors import CheckpointError

_PLAIN = {GGMLQuantizationType.F32: "f32", GGMLQuantizationType.F16: "f16", GGMLQuantizationType.BF16: "bf16"}
_STRIP = 1 << 18
"""Values dequantised together: what bounds the memory of it."""


class GgufFile(RawFile):
    """An open GGUF file: `header`, and tensors read by position.

    Raises:
        CheckpointError: as `read_header`; two tensors or names are one.
    """

    header: Header

    def __init__(self, path: Path) -> None:
        self._quantised: dict[str, GGMLQuantizationType] = {}
        super().__init__(path, self._parse)

    def _parse(self, path: Path, fd: int) -> dict[str, Place]:
        self.header = read_header(path, fd)
        places = {
            e.name: Place(TensorInfo(e.name, self._dtype(e), e.shape), e.offset, e.bytes) for e in self.header.tensors
        }
        if len(places) < len(self.header.tensors):
            raise CheckpointError(f"{path} has two tensors of one name; download it again")
        check_apart(path, places)
        return places

    def transpose(self, names: Iterable[str]) -> None:
        """Have these tensors' matrices be the transpose of what is stored; vectors stay."""
        turned = {}
        for name in names:
            place = self.places[name]
            if len(place.info.shape) == 2:
                info = replace(place.info, shape=place.info.shape[::-1])
                turned[name] = replace(place, info=info, transposed=True)
        self.places = {**self.places, **turned}

    def divide(self, parts: Mapping[str, Sequence[str]]) -> None:
        """Have the matrices that tensors of three axes hold be tensors of their own: `parts` has their names.

        Raises CheckpointError: the file has a tensor of such a name beside.
        """
        places = {name: place for name, place in self.places.items() if name not in parts}
        for name, names in parts.items():
            place, size = self.places[name], self.places[name].bytes // len(names)
            for i, part in enumerate(names):
                if part in places:
                    raise CheckpointError(f"{self.path} has {name} and {part}, which are the same; download it again")
                info = replace(place.info, name=part, shape=place.info.shape[1:])
                places[part] = Place(info, place.offset + i * size, size)
                if name in self._quantised:
                    self._quantised[part] = self._quantised[name]
        self.places = places

    def _dtype(self, entry: TensorEntry) -> str:
        if entry.type in _PLAIN:
            return _PLAIN[entry.type]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[entry.type][1]), np.uint8), entry.type)
        except NotImplementedError:
            return entry.type.name
        self._quantised[entry.name] = entry.type
        return "f32"

    def _stored_rows(self, name: str, start: int, stop: int) -> Words:
        if name not in self._quantised:
            return super()._stored_rows(name, start, stop)
        return self._dequantised(name, start, stop, 0, self._layout(name)[3])

    def _stored_columns(self, name: str, columns: Columns) -> Words:
        if name not in self._quantised or not isinstance(columns, slice):
            return super()._stored_columns(name, columns)
        _, _, rows, cols = self._layout(name)
        first, last, _ = columns.indices(cols)
        return self._dequantised(name, 0, rows, first, last)

    def _dequantised(self, name: str, start: int, stop: int, first: int, last: int) -> Words:
        """Rows `[start, stop)` of columns `[first, last)`; of each row the blocks are read that hold them."""
        place, kind = self.places[name], self._quantised[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = self._layout(name)[3] // block * block_bytes
        begin, end = first // block, -(-last // block)
        out = np.empty((stop - start, last - first), "<f4")
        step = max(1, _STRIP // max(1, (end - begin) * block))
        for r in range(start, stop if out.size else start, step):
            raw = np.empty((min(stop, r + step) - r, (end - begin) * block_bytes), np.uint8)
            at = place.offset + r * row_bytes + begin * block_bytes
            if raw.shape[1] == row_bytes:
                self._fill(name, raw.reshape(-1), at)
            else:
                for i in range(len(raw)):
                    self._fill(name, raw[i], at + i * row_bytes)
            with np.errstate(all="ignore"):  # `pack` tells of what is not finite
                values = dequantize(raw, kind)
            out[r - start : r - start + len(raw)] = values[:, first - begin * block : last - begin * block]
        return out.view("<u4")
