"""adapter_config.json of `peft`, strictly: what changes the arithmetic and is not followed is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flashinfer.checkpoint.huggingface import read_json
from flashinfer.errors import CheckpointError

_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "ensure_weight_tying",
}  # fmt: skip
"""Keys that are followed, or about training, or said by the tensors too."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it was; the others (pissa, olora, ...) change it."""


class _Fields(msgspec.Struct, frozen=True):
    """The keys that are followed."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: list[str] = []


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of the arithmetic."""

    path: Path
    fields: _Fields

    @property
    def use_rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return self.fields.use_rslora

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether linear layers are stored `[in, out]`."""
        return self.fields.fan_in_fan_out

    def rank(self, module: str) -> int:
        """Rank of a module, by its full name; `rank_pattern` counts before `r`."""
        rank = self._of(self.fields.rank_pattern, module, self.fields.r)
        if rank < 1:
            raise CheckpointError(f"{self.path} gives {module[:200]} the rank {rank}; download the adapter again")
        return int(rank)

    def alpha(self, module: str) -> float:
        """Alpha of a module; `alpha_pattern` counts before `lora_alpha`."""
        return self._of(self.fields.alpha_pattern, module, self.fields.lora_alpha)

    def trains(self, name: str) -> bool:
        """Whether a tensor was trained as a whole; peft saves embeddings and heads that were not beside them."""
        modules = name.split(".")
        return any(saved.split(".")[-1] in modules for saved in self.fields.modules_to_save)

    def _of(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        """The first pattern that matches the end of the name, as in `peft.utils.get_pattern_key`."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as e:
                raise CheckpointError(f"{self.path} has the pattern {pattern[:80]!r}, which is none ({e})") from e
        return default


def read_adapter_config(root: Path) -> AdapterConfig:
    """The adapter_config.json of the adapter directory `root`.

    Raises:
        CheckpointError: it is not there, damaged, or asks for more than plain LoRA; names what.
    """
    path = root / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{root} has no adapter_config.json: it is no adapter; give the directory peft saved")
    content = read_json(path)
    _check_supported(path, content)
    try:
        fields = msgspec.convert({k: v for k, v in content.items() if v is not None}, _Fields)
    except msgspec.ValidationError as e:
        raise CheckpointError(f"{path}: {e}; download the adapter again") from e
    return AdapterConfig(path, fields)


def _check_supported(path: Path, content: dict[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is of type {str(content.get('peft_type'))[:40]}; LORA can be merged")
    if content.get("use_dora"):
        raise CheckpointError(
            f"{path} is DoRA (use_dora), which cannot be merged yet; merge it with peft and pack that"
        )
    if content.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path} says init_lora_weights = {str(content['init_lora_weights'])[:40]}, which changes the base model; "
            "save it with path_initial_model_for_weight_conversion, or merge it with peft"
        )
    for key, value in content.items():
        if value and key not in _HARMLESS:
            raise CheckpointError(f"{path} sets {key[:60]}, which is not followed; merge it with peft and pack that")
