"""The vocabulary in the metadata of a GGUF file, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, in llama.cpp as in sentencepiece."""
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in order of their ids, with score and type each; `merges` of a BPE, first is best.

    `special` holds the ids that the file names, under `bos`, `eos`, `unknown` and `padding`.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    special: Mapping[str, int]

    def named(self) -> dict[str, str]:
        """Special tokens by their names in tokenizer_config.json."""
        return {_SPECIAL[key]: self.tokens[i] for key, i in self.special.items()}


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary under `tokenizer.ggml.`.

    Raises:
        ValueError: there is none, its parts are not of one length, or a type is not known.
    """
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges", [])
    if not isinstance(tokens, list) or not tokens or not isinstance(merges, list):
        raise ValueError("its tokenizer has no list of tokens: it is damaged")
    scores = _numbers(metadata, "scores", len(tokens), 0.0)
    types = _numbers(metadata, "token_type", len(tokens), NORMAL)
    if not set(types) <= {*range(NORMAL, BYTE + 1)} or not np.isfinite(scores).all():
        raise ValueError("its tokenizer has types or scores of tokens that are not known: it is damaged")
    named = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _SPECIAL}
    special = {key: i for key, i in named.items() if type(i) is int and 0 <= i < len(tokens)}
    return Vocabulary(tokens, [float(s) for s in scores], [int(t) for t in types], merges, special)


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: float) -> list[float]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise ValueError(f"its tokenizer has {count} tokens and another number of {key}: it is damaged")
    numbers: list[float] = values.tolist()
    return numbers
