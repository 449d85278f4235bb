"""From the metadata of a GGUF file to the config.json of its model, and to its tensors' names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.gguf.architectures import ARCHITECTURES, Architecture
from flashinfer.checkpoint.gguf.rope import rope_config
from flashinfer.layout import Layout

ROPE_FACTORS = "rope_freqs.weight"
_NONE = 0xFFFFFFFF
"""A token id that says there is none."""

Metadata = Mapping[str, Any]


def architecture_of(metadata: Metadata) -> tuple[str, Architecture]:
    """Name and entry of the file's architecture. Raises ValueError: it is not known, or this is one part of several."""
    name = str(metadata.get("general.architecture"))
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"it is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"its architecture is {name[:40]!r}, known are {known}: get the model as safetensors")
    return name, ARCHITECTURES[name]


def model_config(
    metadata: Metadata, tensors: Mapping[str, TensorInfo], factors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """What config.json says of the model.

    Args:
        metadata: of the file.
        tensors: by GGUF's names.
        factors: the tensor `ROPE_FACTORS`, where there is one.

    Raises:
        ValueError: it says something that cannot be followed, or lacks the embedding.
    """
    name, architecture = architecture_of(metadata)
    say = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    for key, followed in architecture.refused.items():
        if say.get(key, followed) != followed:
            raise ValueError(f"it says {name}.{key} = {str(say[key])[:40]}, only {followed} is followed")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no token_embd.weight: it is a vocabulary without a model, or damaged")
    config: dict[str, Any] = {"architectures": [architecture.hugging_face], **architecture.values}
    config |= {key: _number(name, said, say[said]) for key, said in architecture.keys.items() if said in say}
    config |= {key: tensor in tensors for key, tensor in architecture.present.items()}
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config |= _ends(metadata)
    if architecture.rope:
        config |= rope_config({k.removeprefix("rope."): v for k, v in say.items() if k.startswith("rope.")}, factors)
        _check_turned(name, say, config)
    return config


def _ends(metadata: Metadata) -> dict[str, Any]:
    """`bos_token_id`, and `eos_token_id`: what ends a text, and a turn of a chat where that is another."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id", _NONE) for key in ("bos", "eos", "eot")}
    known = {key: i for key, i in ids.items() if type(i) is int and i != _NONE}
    found: dict[str, Any] = {"bos_token_id": known["bos"]} if "bos" in known else {}
    ends = list(dict.fromkeys(known[key] for key in ("eos", "eot") if key in known))
    return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def _number(name: str, key: str, value: Any) -> int | float:
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()  # one number per layer, all the same
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"it says {name}.{key} = {str(value)[:40]}, one positive number was expected")
    return value


def _check_turned(name: str, say: Metadata, config: Mapping[str, Any]) -> None:
    """That whole heads are turned, and that keys and values are of one size."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head = config.get("head_dim", hidden // heads if heads and hidden else None)
    for key in ("rope.dimension_count", "attention.value_length"):
        if say.get(key, head) != head:
            raise ValueError(f"it says {name}.{key} = {say[key]} for heads of {head}, which is not followed")


def tensor_names(metadata: Metadata, layout: Layout, tensors: Mapping[str, TensorInfo], layers: int) -> dict[str, str]:
    """The layout's name -> GGUF's, for every tensor of the file; one the layout has no place for keeps its name.

    Raises:
        ValueError: more layers than tensors.
    """
    if not 0 < layers <= len(tensors):
        raise ValueError(f"it says {layers} layers for {len(tensors)} tensors")
    name, _ = architecture_of(metadata)
    kind = next(k for k, v in MODEL_ARCH_NAMES.items() if v == name)
    table = get_tensor_name_map(kind, layers)
    found: dict[str, str] = {}
    for pattern in layout.tensors.values():
        for i in range(layers) if "{i}" in pattern.name else (0,):
            theirs = pattern.name.replace("{prefix}", layout.prefixes[0]).replace("{i}", str(i))
            ours = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if ours is not None and ours in tensors:
                found[theirs] = ours
    placed = {*found.values(), ROPE_FACTORS}
    return found | {ours: ours for ours in tensors if ours not in placed}
