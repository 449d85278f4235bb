"""A Hugging Face checkpoint directory: config.json, safetensors or PyTorch files (one or sharded), tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashinfer.checkpoint.base import Columns, TensorInfo, Words
from flashinfer.checkpoint.raw import RawFile
from flashinfer.checkpoint.safetensors import SafetensorsFile
from flashinfer.checkpoint.torch_file import TorchFile
from flashinfer.errors import CheckpointError

KINDS: tuple[tuple[str, Callable[[Path], RawFile]], ...] = (
    ("model.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchFile),
)
"""The file of a checkpoint in one piece, and what reads it or the shards of its `.index.json`; the first one counts."""
TEXT_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
"""Carried into the store. config.json is among them for the token ids that older checkpoints keep only there."""


class HuggingFaceCheckpoint:
    """The tensors of all shards of one directory under their names. See `Checkpoint`."""

    def __init__(self, root: Path) -> None:
        self.path = root
        if not (root / "config.json").is_file():
            raise CheckpointError(
                f"{root} has no config.json: it is not a Hugging Face checkpoint; give the directory of one"
            )
        self.config: Mapping[str, Any] = read_json(root / "config.json")
        self.text: Mapping[str, Path] = {n: root / n for n in TEXT_FILES if (root / n).is_file()}
        self._files: dict[str, RawFile] = {}
        self._home: dict[str, RawFile] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        try:
            self._open(*_shards(root))
        except BaseException:
            self.close()
            raise

    def _open(self, shards: dict[str, list[str] | None], index: str, reader: Callable[[Path], RawFile]) -> None:
        found: dict[str, TensorInfo] = {}
        for shard, names in shards.items():
            file = self._files[shard] = reader(self.path / shard)
            tensors = file.tensors
            for name in tensors if names is None else names:
                if name not in tensors:
                    raise CheckpointError(
                        f"tensor {name} is not in {self.path / shard}, where {index} says it is; download it again"
                    )
                found[name], self._home[name] = tensors[name], file
        self.tensors = found
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds no tensors; download the checkpoint again")

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        return self._home[name].read_rows(name, start, stop)

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        return self._home[name].read_columns(name, columns)

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        self._home[name].will_need(name)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def _shards(root: Path) -> tuple[dict[str, list[str] | None], str, Callable[[Path], RawFile]]:
    """Shard file -> names of its tensors (None where the only file is its own index); the index; what reads a shard."""
    for single, reader in KINDS:
        index = f"{single}.index.json"
        if (root / single).is_file():
            return {single: None}, index, reader
        if (root / index).is_file():
            return _indexed(root, index), index, reader
    wanted = ", ".join(f"{single} or {single}.index.json" for single, _ in KINDS)
    raise CheckpointError(f"{root} has no weights: {wanted}, or one .gguf file was expected; download them too")


def _indexed(root: Path, index: str) -> dict[str, list[str] | None]:
    weight_map = read_json(root / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{root / index} has no weight_map of names to files; download it again")
    shards: dict[str, list[str] | None] = {}
    for name, shard in weight_map.items():
        names = shards.setdefault(shard, [])
        assert names is not None
        names.append(name)
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{root / index} names {shard!r}, which is not a plain file name")
        if not (root / shard).is_file():
            raise CheckpointError(f"{root / shard} is missing, though {index} names it; download it again")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError: it cannot be read, or is none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}); download it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content
