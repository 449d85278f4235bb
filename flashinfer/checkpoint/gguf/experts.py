"""Experts of a GGUF file: one matrix each, whether the file has them apart or in one tensor. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from flashinfer.checkpoint.base import TensorInfo

Tensors = Mapping[str, TensorInfo]

OF_EXPERTS = "_exps."
"""In the name of a tensor that holds a matrix of each expert."""
_MOST = 1 << 12
"""Experts of a layer; far more than any model has: a name is made for each."""


@dataclass(frozen=True)
class Stacked:
    """A tensor of `shape`, experts its first axis: the file's matrices `names`, all alike, one below the other."""

    names: tuple[str, ...]
    shape: tuple[int, int, int]

    def dtype(self, inside: Tensors) -> str:
        """Of its values."""
        return inside[self.names[0]].dtype


def experts_apart(inside: Tensors) -> dict[str, list[str]]:
    """The tensors that hold all experts of a layer (`ffn_up_exps`), and what each one's matrix is called in files that
    have them apart, as the first ones had (`ffn_up.0`, `ffn_up.1`, ...).

    Raises:
        ValueError: more experts than any model has.
    """
    found = {name: info.shape[0] for name, info in inside.items() if OF_EXPERTS in name and len(info.shape) == 3}
    for name, experts in found.items():
        if experts > _MOST:
            raise ValueError(f"tensor {name} has {experts} experts")
    return {name: [_apart(name, e) for e in range(experts)] for name, experts in found.items()}


def each_expert(name: str, inside: Tensors) -> list[str]:
    """The matrices that `name` would hold together, one for each expert."""
    return list(takewhile(inside.__contains__, (_apart(name, e) for e in count())))


def stacked(names: Sequence[str], inside: Tensors) -> Stacked | None:
    """A tensor with, for each expert, the rows of all of `names`; None where the file has no such experts.

    Raises:
        ValueError: they are not alike.
    """
    found = [each_expert(name, inside) for name in names]
    if not any(found):
        return None
    parts = tuple(part for expert in zip(*found, strict=False) for part in expert)
    alike = {(inside[part].shape, inside[part].dtype) for part in parts}
    if len(alike) != 1 or len({len(some) for some in found}) > 1:
        raise ValueError(f"the experts of {' and '.join(names)} differ in number, shape or type")
    rows, columns = inside[parts[0]].shape
    return Stacked(parts, (len(found[0]), rows * len(names), columns))


def _apart(name: str, expert: int) -> str:
    return name.replace(OF_EXPERTS, f".{expert}.")
