"""LoRA adapters as `peft` saves them: adapter_config.json beside adapter_model.safetensors or .bin.

LoRA (arXiv 2106.09685) adds `scale * B A` to a matrix: A is `[rank, in]`, B is `[out, rank]`, the scale is alpha / rank
(rsLoRA, arXiv 2312.03732: alpha / sqrt(rank)). Whatever else such a file may ask for is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashinfer.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.raw import RawFile
from flashinfer.checkpoint.safetensors import SafetensorsFile
from flashinfer.checkpoint.torch_file import TorchFile
from flashinfer.errors import CheckpointError

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix, `scale * B A`.

    `a` `[rank, in]` and `b` `[out, rank]` are tensors of the adapter's file. `transposed`: the matrix is stored
    `[in, out]` (embeddings, and linear layers where `fan_in_fan_out`).
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix it is added to, as it is stored."""
        out, size = self.b.shape[0], self.a.shape[1]
        return (size, out) if self.transposed else (out, size)


@dataclass(frozen=True)
class Adapter:
    """An open adapter. Names are those of the model's tensors, as transformers has them.

    `low_rank` is what is added, `saved` the tensors that take the place of the model's (trained as a whole: biases,
    `modules_to_save`) or kept beside. `file` is theirs to read from; close it when done.
    """

    path: Path
    config: AdapterConfig
    file: RawFile
    low_rank: Mapping[str, LowRank]
    saved: Mapping[str, TensorInfo]


def open_adapter(path: str | Path) -> Adapter:
    """Open the adapter directory at `path`.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not (only) LoRA: says what else it is.
    """
    root = Path(path)
    config = read_adapter_config(root)
    file = _open_file(root)
    try:
        return _sorted_out(root, file, config)
    except BaseException:
        file.close()
        raise


def _open_file(root: Path) -> RawFile:
    if (root / "adapter_model.safetensors").is_file():
        return SafetensorsFile(root / "adapter_model.safetensors")
    if (root / "adapter_model.bin").is_file():
        return TorchFile(root / "adapter_model.bin")
    raise CheckpointError(f"{root} has no adapter_model.safetensors and no adapter_model.bin; download it again")


def _sorted_out(root: Path, file: RawFile, config: AdapterConfig) -> Adapter:
    """Every tensor of the file given its part."""
    pairs: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    saved: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        short = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        part = _PART.fullmatch(short)
        if part is not None:
            pairs.setdefault((part[1], part[2] is not None), {})[part[3]] = info
        elif "lora_" in short:
            raise CheckpointError(f"{root} has tensor {name[:200]}: plain LoRA (lora_A and lora_B) can be merged")
        else:
            saved[short] = info
    if not pairs and not saved:
        raise CheckpointError(f"{root} holds no tensors; download it again")
    low_rank = {f"{m}.weight": _low_rank(root, config, m, embedding, parts) for (m, embedding), parts in pairs.items()}
    return Adapter(root, config, file, low_rank, saved)


def _low_rank(
    root: Path, config: AdapterConfig, module: str, embedding: bool, parts: Mapping[str, TensorInfo]
) -> LowRank:
    rank, alpha = config.rank(module), config.alpha(module)
    shapes = {k: list(info.shape) for k, info in sorted(parts.items())}
    sound = len(parts) == 2 and all(len(shape) == 2 for shape in shapes.values())
    if not sound or shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise CheckpointError(
            f"module {module[:200]} of {root} has lora tensors {shapes}; A [{rank}, in] and B [out, {rank}] were "
            "expected by adapter_config.json: they do not belong together"
        )
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return LowRank(parts["A"], parts["B"], scale, embedding or config.fan_in_fan_out)
