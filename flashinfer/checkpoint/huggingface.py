"""A Hugging Face checkpoint directory: config.json, safetensors files (one or sharded), tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Checkpoint, TensorInfo, Words
from flashinfer.checkpoint.safetensors import SafetensorsFile
from flashinfer.errors import CheckpointError
from flashinfer.store.open import hub_hint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
"""Carried into the store. config.json is among them for the token ids that older checkpoints keep only there."""
_LATER = {
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint directory at `path`. Close it when done.

    Raises:
        CheckpointError: there is none, or it is incomplete, damaged, or of a kind that is not read yet.
    """
    root = Path(path)
    if not root.exists():
        hint = hub_hint(str(root)) or "give the directory of a downloaded checkpoint"
        raise CheckpointError(f"{root} does not exist; {hint}")
    if not root.is_dir():
        kind = _LATER.get(root.suffix)
        then = f"{kind} files are not read yet, safetensors are" if kind else "give its directory"
        raise CheckpointError(f"{root} is a file, a checkpoint is a directory with config.json: {then}")
    return HuggingFaceCheckpoint(root)


class HuggingFaceCheckpoint:
    """The tensors of all shards of one directory under their names. See `Checkpoint`."""

    def __init__(self, root: Path) -> None:
        self.path = root
        if not (root / "config.json").is_file():
            raise CheckpointError(
                f"{root} has no config.json: it is not a Hugging Face checkpoint; give the directory of one"
            )
        self.config: Mapping[str, Any] = _read_json(root / "config.json")
        self.text: Mapping[str, Path] = {n: root / n for n in TEXT_FILES if (root / n).is_file()}
        shards = _shards(root)
        self._files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, SafetensorsFile] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        try:
            self._open(shards)
        except BaseException:
            self.close()
            raise

    def _open(self, shards: dict[str, list[str] | None]) -> None:
        found: dict[str, TensorInfo] = {}
        for shard, names in shards.items():
            file = self._files[shard] = SafetensorsFile(self.path / shard)
            tensors = file.tensors
            for name in tensors if names is None else names:
                if name not in tensors:
                    raise CheckpointError(
                        f"tensor {name} is not in {self.path / shard}, where {INDEX} says it is; download it again"
                    )
                found[name], self._home[name] = tensors[name], file
        self.tensors = found
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds no tensors; download the checkpoint again")

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        return self._home[name].read_rows(name, start, stop)

    def read_columns(self, name: str, columns: slice | npt.NDArray[np.int64]) -> Words:
        """See `Checkpoint.read_columns`."""
        return self._home[name].read_columns(name, columns)

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        self._home[name].will_need(name)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def _shards(root: Path) -> dict[str, list[str] | None]:
    """Shard file -> names of its tensors; None where the only file is its own index."""
    if (root / SINGLE).is_file():
        return {SINGLE: None}
    if not (root / INDEX).is_file():
        kinds = sorted({_LATER[p.suffix] for p in root.iterdir() if p.suffix in _LATER})
        found = f" ({' and '.join(kinds)} files are there; that format comes later)" if kinds else ""
        raise CheckpointError(f"{root} has no {SINGLE} and no {INDEX}{found}: safetensors is what is read now")
    weight_map = _read_json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{root / INDEX} has no weight_map of names to files; download it again")
    shards: dict[str, list[str] | None] = {}
    for name, shard in weight_map.items():
        names = shards.setdefault(shard, [])
        assert names is not None
        names.append(name)
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{root / INDEX} names {shard!r}, which is not a plain file name")
        if not (root / shard).is_file():
            raise CheckpointError(f"{root / shard} is missing, though {INDEX} names it; download it again")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}); download it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content
