"""From the metadata of a GGUF file to the config.json of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.gguf.architecture import NEUTRAL
from flashinfer.checkpoint.gguf.description import Description
from flashinfer.checkpoint.gguf.rope import Factors, rope_config

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_NONE = 0xFFFFFFFF
"""A token id that says there is none."""

Metadata = Mapping[str, Any]


def model_config(
    metadata: Metadata, tensors: Mapping[str, TensorInfo], factors: Mapping[str, Factors]
) -> dict[str, Any]:
    """What config.json says of the model.

    Args:
        metadata: of the file.
        tensors: by GGUF's names.
        factors: see `rope.rope_config`.

    Raises:
        ValueError: it says something that cannot be followed, or lacks the embedding.
    """
    of = Description(metadata)
    row = of.architecture
    for key, neutral in NEUTRAL.items():
        if key in of.said and key not in (*row.keys.values(), *row.followed) and not _is(of.said[key], neutral):
            raise of.wrong(key, f"only {neutral} is followed")
    if EMBEDDING not in tensors:
        raise ValueError(f"it has no {EMBEDDING}: it is a vocabulary without a model, or damaged")
    config: dict[str, Any] = {"architectures": [row.hugging_face], **row.values, **_numbers(of)}
    config |= {key: tensor in tensors for key, tensor in row.present.items()}
    config |= {key: tensor not in tensors for key, tensor in row.absent.items()}
    config |= {key: compute(of, tensors) for key, compute in row.computed.items()}
    config["vocab_size"] = tensors[EMBEDDING].shape[0]
    config["tie_word_embeddings"] = HEAD not in tensors
    config |= _ends(metadata)
    return config | ({"rope_parameters": rope_config(of, factors)} if row.rope else {})


def _numbers(of: Description) -> dict[str, Any]:
    """What is a number or a yes or no, by the keys of config.json."""
    found: dict[str, Any] = {}
    for theirs, ours in of.architecture.keys.items():
        value = of.said.get(ours)
        if ours == "attention.head_count_kv":
            found[theirs] = of.heads.keys
        elif isinstance(value, bool):
            found[theirs] = value
        elif value is not None and not (NEUTRAL.get(ours) == 0 and _is(value, 0)):
            found[theirs] = of.number(ours)
    return found


def _is(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool | int | float) and value == neutral


def _ends(metadata: Metadata) -> dict[str, Any]:
    """`bos_token_id`, and `eos_token_id`: what ends a text, and a turn of a chat where that is another."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id", _NONE) for key in ("bos", "eos", "eot")}
    known = {key: i for key, i in ids.items() if type(i) is int and i != _NONE}
    found: dict[str, Any] = {"bos_token_id": known["bos"]} if "bos" in known else {}
    ends = list(dict.fromkeys(known[key] for key in ("eos", "eot") if key in known))
    return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
