"""The tensors of a Hugging Face checkpoint in f16, where they lie: what peers need and no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Source:
    """Where an f16 tensor lies."""

    file: Path
    offset: int
    shape: tuple[int, ...]

    def read(self) -> npt.NDArray[np.float16]:
        """All of it."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return np.fromfile(file, dtype="<f2", count=int(np.prod(self.shape))).reshape(self.shape)


def sources(root: Path) -> dict[str, Source]:
    """Every tensor of the checkpoint by name."""
    found = {}
    for path in sorted(root.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "F16":
                raise SystemExit(f"{name} is {entry['dtype']}; only f16 checkpoints are read for other programs")
            found[name] = Source(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found
