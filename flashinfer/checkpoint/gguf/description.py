"""What the metadata of a GGUF file say of its model, and of which architecture that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashinfer.checkpoint.gguf.architectures import ARCHITECTURES
from flashinfer.checkpoint.gguf.forms import Heads


class Description:
    """The entries of one architecture: their keys are without its name in front.

    Raises:
        ValueError: the architecture is not known, or this is one part of several.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        name, parts = metadata.get("general.architecture"), metadata.get("split.count", 0)
        if type(parts) is not int or parts > 1:
            raise ValueError(f"it is one of {str(parts)[:40]} parts: join them with llama-gguf-split --merge")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"its architecture is {str(name)[:40]!r}, known are {known}: get the model as safetensors")
        mark = f"{name}."
        self.said: Mapping[str, Any] = {k.removeprefix(mark): v for k, v in metadata.items() if k.startswith(mark)}
        self.name, self.architecture = name, ARCHITECTURES[name]
        if self.architecture.mixture is not None and isinstance(experts := self.said.get("expert_count"), int):
            self.architecture = self.architecture.mixture if experts else self.architecture

    def number(self, key: str, default: float | None = None) -> int | float:
        """A positive number; one for each layer where all are the same.

        Raises ValueError: it is none, or is not there and has no default.
        """
        value = self.said.get(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
            raise self.wrong(key, "one positive number was expected")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises ValueError as `number`."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.wrong(key, "a whole number was expected")
        return value

    @property
    def layers(self) -> int:
        """How many there are. Raises ValueError: it does not say."""
        return self.whole("block_count")

    @property
    def heads(self) -> Heads:
        """Of queries, and of keys: as many where it does not say. Raises ValueError: it does not say."""
        queries = self.whole("attention.head_count")
        return Heads(queries, self.whole("attention.head_count_kv", queries))

    @property
    def head_dim(self) -> int:
        """Values of a head. Raises ValueError: it does not say, or those of keys and values differ."""
        value = "attention.value_length"
        size = self.whole("attention.key_length", self.whole("embedding_length") // self.heads.queries)
        if self.whole(value, size) != size:
            raise self.wrong(value, f"{size} as for keys was expected")
        return size

    def wrong(self, key: str, why: str) -> ValueError:
        """The error of what it says under a key."""
        return ValueError(f"it says {self.name}.{key} = {str(self.said.get(key))[:40]}, {why}")
