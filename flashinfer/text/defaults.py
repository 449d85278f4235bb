"""What a checkpoint says about generating from it: `generation_config.json` and `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from flashinfer.config import SamplingConfig
from flashinfer.text.config import read_json

T = TypeVar("T")


class _EosConfig(msgspec.Struct, frozen=True):
    """The key of `config.json` used here."""

    eos_token_id: int | list[int] | None = None


class GenerationDefaults(_EosConfig, frozen=True):
    """`generation_config.json`: types are checked, keys not listed are ignored, null means unset."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

    def sampling(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> SamplingConfig:
        """The defaults, overridden by what is not None.

        Greedy unless `do_sample` is set; naming `temperature`, `top_k`, `top_p` or `min_p` asks for sampling.
        The values are not checked here: `Sampler` does.
        """
        samples = self.do_sample or not (top_k is top_p is min_p is None)
        if temperature is None:
            temperature = _first(self.temperature, 1.0) if samples else 0.0
        return SamplingConfig(
            temperature=temperature,
            top_k=_first(top_k, self.top_k, 0),
            top_p=_first(top_p, self.top_p, 1.0),
            min_p=_first(min_p, self.min_p, 0.0),
            repetition_penalty=_first(repetition_penalty, self.repetition_penalty, 1.0),
            seed=seed,
        )


def _first(*values: T | None) -> T:
    return next(v for v in values if v is not None)


def load_generation_defaults(files: Mapping[str, Path]) -> GenerationDefaults:
    """Defaults of a checkpoint whose text files are `files`, by the names the checkpoint used.

    The EOS ids are those of `generation_config.json`; where it has none, those of `config.json`.

    Raises:
        StoreError: one of the files is damaged, or a value has the wrong type.
    """
    defaults = GenerationDefaults()
    if path := files.get("generation_config.json"):
        defaults = read_json(path, GenerationDefaults)
    if defaults.eos_token_id is None and (path := files.get("config.json")):
        defaults = msgspec.structs.replace(defaults, eos_token_id=read_json(path, _EosConfig).eos_token_id)
    return defaults
