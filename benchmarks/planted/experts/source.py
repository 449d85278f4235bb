"""A mixture as a checkpoint that lies nowhere: every tensor is made when it is read, so `pack` needs no disk for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint import TensorInfo
from flashinfer.checkpoint.base import Columns

from ..shapes import BOS, EOS
from ..text import lexicon
from ..write import Noise, write_tokenizer
from .locality import Mix
from .matrices import Matrices
from .shape import MixtureShape

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]


class PlantedMixture:
    """See `checkpoint.Checkpoint`. float32.

    Noise is one pool of normal numbers, read from a place of its own for each tensor: no two experts are the same
    bytes, but all are made of the same numbers (which no program here can make use of).
    """

    def __init__(self, shape: MixtureShape, mix: Mix | None = None, seed: int = 0) -> None:
        self.path = Path(f"synthetic-{shape.layers}-layers")
        self.shape = shape
        self.config: Mapping[str, Any] = shape.config()
        self.tensors: Mapping[str, TensorInfo] = {n: TensorInfo(n, "f32", s) for n, s in shape.tensors().items()}
        self._index = {name: n for n, name in enumerate(self.tensors)}
        self._noise, self._matrices = Noise(seed), Matrices(shape, mix or Mix(), seed)
        self._folder = TemporaryDirectory()
        self.text: Mapping[str, Path] = _text_files(Path(self._folder.name), shape)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows `[start, stop)` of a matrix, all of them where nobody says; a vector is one row."""
        rows, columns = self.tensors[name].matrix
        stop = rows if stop is None else stop
        if len(self.tensors[name].shape) == 1:
            return np.full((stop - start, columns), self._matrices.norm(name), dtype=np.float32)
        plan = self._matrices.matrix(name)
        values = self._noise.rows(self._index[name], start, stop - start, columns)
        values *= np.float32(plan.noise)
        if plan.left is not None and plan.right is not None:
            left = plan.left[start:stop]
            values += (left - values @ plan.right.T if plan.clean else left) @ plan.right
        return values

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        return self.values(name, start, stop).view(np.uint32)

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        return self.values(name).view(np.uint32)[:, columns]

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._folder.cleanup()


def _text_files(folder: Path, shape: MixtureShape) -> dict[str, Path]:
    """A tokenizer that knows the words of `text.pseudo_text`, and what begins and ends a text."""
    write_tokenizer(folder, shape.vocab, lexicon())
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    return {path.name: path for path in sorted(folder.iterdir())}
