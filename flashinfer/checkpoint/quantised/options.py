"""What `quantization_config` in config.json says, checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from flashinfer.errors import CheckpointError

T = TypeVar("T", int, str, bool)


def one_of(path: Path, options: Mapping[str, Any], key: str, known: tuple[T, ...], default: T | None = None) -> T:
    """The value of `key`, one of those `known`. Raises CheckpointError for any other."""
    value = options.get(key)
    value = default if value is None else value
    for each in known:
        if value == each and type(value) is type(each):
            return each
    wanted = " or ".join(map(str, known))
    raise CheckpointError(
        f"{path} is quantised with {key} = {str(value)[:80]}, only {wanted} is read; get another quantisation of the "
        "model, or the model as it was"
    )


def group_size(path: Path, value: object) -> int | None:
    """Columns that share a scale; None, for -1, are all of a row. Raises CheckpointError."""
    if type(value) is not int or not (value == -1 or value > 0):
        raise CheckpointError(
            f"{path} is quantised with group_size = {str(value)[:80]}, a positive number or -1 was expected; "
            "correct its config.json"
        )
    return None if value == -1 else value
