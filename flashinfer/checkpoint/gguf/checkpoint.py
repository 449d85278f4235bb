"""A GGUF file as a `Checkpoint`: its tensors under the names, and in the order of rows, that the layouts expect."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.checkpoint.base import Columns, TensorInfo, Words
from flashinfer.checkpoint.gguf.config import model_config
from flashinfer.checkpoint.gguf.description import Description
from flashinfer.checkpoint.gguf.experts import Stacked, experts_apart
from flashinfer.checkpoint.gguf.forms import extents
from flashinfer.checkpoint.gguf.names import Stored, form_of, stored_tensors
from flashinfer.checkpoint.gguf.rope import FREQUENCIES, LONG, SHORT, Factors
from flashinfer.checkpoint.gguf.tensors import GgufFile
from flashinfer.checkpoint.gguf.tokenizer import tokenizer_files
from flashinfer.errors import CheckpointError
from flashinfer.layout import find_layout
from flashinfer.layout.view import Index
from flashinfer.quant import codec_named


class GgufCheckpoint:
    """See `Checkpoint`. Quantised tensors are the float32 that they stand for; the files of `text` are generated.

    Raises:
        CheckpointError: the file is damaged, or of an architecture, a tokenizer or with settings that are not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._describe()
        except ValueError as e:
            self.close()
            raise CheckpointError(f"{path} cannot be packed: {e}") from e
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        metadata, inside = self._file.header.metadata, self._file.tensors
        of = Description(metadata)
        factors = {name: self._factors(inside[name]) for name in (FREQUENCIES, LONG, SHORT) if name in inside}
        self.config: Mapping[str, Any] = model_config(metadata, inside, factors)
        self._file.transpose(name for name in inside if form_of(of.architecture, name).transposed)
        self._file.divide(experts_apart(inside))
        inside = {name: info for name, info in self._file.tensors.items() if name not in factors}
        layout = find_layout(self.config, inside)
        self._stored = stored_tensors(of, layout, self.config, inside)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, stored.dtype(inside), stored.shape) for name, stored in self._stored.items()
        }
        self.text: Mapping[str, Path] = self._write_text(metadata)

    def _factors(self, info: TensorInfo) -> Factors:
        if info.dtype != "f32" or len(info.shape) != 1:
            raise ValueError(f"its {info.name} is {info.dtype} {list(info.shape)}, a vector of f32 was expected")
        factors: Factors = self._file.read_rows(info.name, 0, 1)[0].view("<f4")
        return factors

    def _write_text(self, metadata: Mapping[str, Any]) -> dict[str, Path]:
        self._folder = tempfile.TemporaryDirectory(prefix="flashinfer-gguf-")
        files = {"config.json": json.dumps(self.config, indent=1).encode(), **tokenizer_files(metadata)}
        written = {name: Path(self._folder.name) / name for name in files}
        for name, path in written.items():
            path.write_bytes(files[name])
        return written

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        stored = self._stored[name]
        if isinstance(stored, Stacked):
            return self._stacked(stored, start, stop)
        if len(stored.shape) == 1:
            return self._vector(stored)
        if stored.rows is None:
            return self._file.read_rows(stored.name, start, stop)
        return self._gathered(stored.name, stored.rows[start:stop])

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        stored = self._stored[name]
        if isinstance(stored, Stacked):
            parts: list[Any] = [self._file.read_columns(part, columns) for part in stored.names]
            return np.concatenate(parts)
        if len(stored.shape) == 1:
            return self._vector(stored)[:, columns]
        found = self._file.read_columns(stored.name, columns)
        return found if stored.rows is None else found[stored.rows]

    def _stacked(self, stored: Stacked, start: int, stop: int) -> Words:
        """Rows `[start, stop)` of what lies in several matrices of the file."""
        rows = self._file.tensors[stored.names[0]].shape[0]
        parts = range(start // rows, -(-stop // rows))
        words: Words = np.concatenate([
            self._file.read_rows(stored.names[i], max(0, start - i * rows), min(rows, stop - i * rows)) for i in parts
        ])  # fmt: skip
        return words

    def _vector(self, stored: Stored) -> Words:
        """All of it, `[1, length]`; where the file's tensor is a matrix, it is one of its rows."""
        if len(self._file.tensors[stored.name].shape) == 2:
            assert stored.rows is not None
            return self._gathered(stored.name, stored.rows)
        words = self._file.read_rows(stored.name, 0, 1)
        if stored.rows is not None:
            return words[:, stored.rows]
        if not stored.plus_one:
            return words
        values = codec_named(self._file.tensors[stored.name].dtype).decode(words.view(np.uint8))
        return (values - np.float32(1)).view("<u4")

    def _gathered(self, name: str, rows: Index) -> Words:
        """Those rows of the file's matrix, in that order."""
        pieces = extents(rows)
        words: Words = np.concatenate([self._file.read_rows(name, start, stop) for start, stop in pieces])
        numbers = np.concatenate([np.arange(start, stop) for start, stop in pieces])
        return words[np.searchsorted(numbers, rows)]

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        for part in self._stored[name].names:
            self._file.will_need(part)

    def close(self) -> None:
        """Close the file and remove the generated ones. Idempotent."""
        self._file.close()
        if self._folder is not None:
            self._folder.cleanup()
