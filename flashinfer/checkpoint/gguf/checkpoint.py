"""A GGUF file as a `Checkpoint`: its tensors under the names, and in the order of rows, that the layouts expect."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Columns, TensorInfo, Words
from flashinfer.checkpoint.gguf.config import ROPE_FACTORS, architecture_of, model_config, tensor_names
from flashinfer.checkpoint.gguf.tensors import GgufFile
from flashinfer.checkpoint.gguf.tokenizer import tokenizer_files
from flashinfer.errors import CheckpointError
from flashinfer.layout import find_layout


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
        _, architecture = architecture_of(metadata)
        self.config: Mapping[str, Any] = model_config(metadata, inside, self._rope_factors(inside))
        layers = int(self.config.get("num_hidden_layers", 0))
        self._names = tensor_names(metadata, find_layout(self.config, inside), inside, layers)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, inside[theirs].dtype, inside[theirs].shape) for name, theirs in self._names.items()
        }
        self._heads: dict[str, int] = {}
        for name, theirs in self._names.items():
            key = architecture.interleaved.get(theirs.rpartition(".")[0].rpartition(".")[2])
            if key is not None:
                self._heads[name] = self._head_count(name, key)
        self.text: Mapping[str, Path] = self._write_text(metadata)

    def _rope_factors(self, inside: Mapping[str, TensorInfo]) -> npt.NDArray[np.float32] | None:
        info = inside.get(ROPE_FACTORS)
        if info is None:
            return None
        if info.dtype != "f32" or len(info.shape) != 1:
            raise ValueError(f"its {ROPE_FACTORS} is {info.dtype} {list(info.shape)}, a vector of f32 was expected")
        factors: npt.NDArray[np.float32] = self._file.read_rows(ROPE_FACTORS, 0, 1)[0].view("<f4")
        return factors

    def _head_count(self, name: str, key: str) -> int:
        count = self.config.get(key, self.config.get("num_attention_heads"))
        outputs = self.tensors[name].shape[0]
        if not isinstance(count, int) or count < 1 or outputs % (2 * count):
            raise ValueError(f"tensor {name} has {outputs} rows, which {count} heads do not divide into pairs")
        return count

    def _write_text(self, metadata: Mapping[str, Any]) -> dict[str, Path]:
        self._folder = tempfile.TemporaryDirectory(prefix="flashinfer-gguf-")
        files = {"config.json": json.dumps(self.config, indent=1).encode(), **tokenizer_files(metadata)}
        written = {name: Path(self._folder.name) / name for name in files}
        for name, path in written.items():
            path.write_bytes(files[name])
        return written

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        theirs = self._names[name]
        if name not in self._heads:
            return self._file.read_rows(theirs, start, stop)
        if len(self.tensors[name].shape) == 1:
            return self._file.read_rows(theirs, start, stop)[:, self._order(name)]
        size = self.tensors[name].shape[0] // self._heads[name]
        first, last = start // size * size, -(-stop // size) * size  # whole heads
        return self._file.read_rows(theirs, first, last)[self._order(name)[start:stop] - first]

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        theirs = self._names[name]
        if name not in self._heads:
            return self._file.read_columns(theirs, columns)
        if len(self.tensors[name].shape) == 1:
            return self._file.read_columns(theirs, self._order(name)[columns])
        return self._file.read_columns(theirs, columns)[self._order(name)]

    def _order(self, name: str) -> npt.NDArray[np.int64]:
        """Which row of the file each row is: of each head, pairs (x0, y0, x1, y1) become halves (x0, x1, y0, y1)."""
        rows, heads = self.tensors[name].shape[0], self._heads[name]
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        self._file.will_need(self._names[name])

    def close(self) -> None:
        """Close the file and remove the generated ones. Idempotent."""
        self._file.close()
        if self._folder is not None:
            self._folder.cleanup()
