"""Which tensor of a GGUF file, or which part of it, each tensor is that a layout names. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.gguf.architectures import ARCHITECTURES, Architecture
from flashinfer.checkpoint.gguf.forms import Form, Heads, Index
from flashinfer.layout import Layout
from flashinfer.layout.resolve import Resolver

Tensors = Mapping[str, TensorInfo]

_PARTS = ("attn_q", "attn_k", "attn_v")
_MOST_ROWS = 1 << 24
"""Far more than any model has: a list is made of them before the layout can contradict."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of `shape` as it lies in the file's tensor `name`.

    `rows`: which rows of that each row is (of a vector, which elements), None where it is the tensor as it is.
    `plus_one`: the file's values are one more.
    """

    name: str
    shape: tuple[int, ...]
    rows: Index | None = None
    plus_one: bool = False


def stored_tensors(
    name: str, layout: Layout, config: Mapping[str, Any], inside: Tensors, layers: int, heads: Heads
) -> dict[str, Stored]:
    """By the names of the layout; a tensor it has no place for keeps its own.

    Args:
        name: the architecture.
        layout: that of the architecture.
        config: what config.json says.
        inside: the file's tensors by GGUF's names, transposed ones already as the layout wants them.
        layers: how many there are.
        heads: of queries and keys.

    Raises:
        ValueError: more layers than tensors, or heads that do not divide a tensor's rows.
        LayoutError: the layout cannot follow the config.
    """
    if not 0 < layers <= len(inside):
        raise ValueError(f"it says {layers} layers for {len(inside)} tensors")
    architecture = ARCHITECTURES[name]
    table = get_tensor_name_map(next(k for k, v in MODEL_ARCH_NAMES.items() if v == name), layers)
    found: dict[str, Stored] = {}
    for template in _templates(layout, config):
        for i in range(layers) if "{i}" in template else (0,):
            theirs = [template.replace("{prefix}", prefix).replace("{i}", str(i)) for prefix in layout.prefixes]
            found |= _place(theirs, architecture, table, inside, heads)
    placed = {stored.name for stored in found.values()}
    return found | {n: Stored(n, info.shape) for n, info in inside.items() if n not in placed}


def form_of(architecture: Architecture, name: str) -> Form:
    """What the file has done to its tensor of that name."""
    stem = _stem(name)
    return architecture.forms.get(f"{stem}.{name.rpartition('.')[2]}") or architecture.forms.get(stem, Form())


def _templates(layout: Layout, config: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tensors that such a model has."""
    resolver = Resolver(layout, config)
    for pattern in layout.tensors.values():
        yield from [name for name, when in pattern.candidates if resolver.holds(when)][:1]


def _stem(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _place(
    names: Sequence[str], architecture: Architecture, table: TensorNameMap, inside: Tensors, heads: Heads
) -> dict[str, Stored]:
    """Where a tensor of a layout lies, if it does; all of them where its name counts rows of one tensor.

    `names`: what the layout calls it, with each of its prefixes; the library knows some without.
    """
    theirs = whole = names[0]
    for part, instead in architecture.stacked.items():
        names = [name.replace(part, instead) for name in names]
        whole = names[0]
    known = (table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names)
    ours = next((name for name in known if name is not None), None)
    if ours is None:
        return {}
    if whole != theirs and ours in inside:
        return _unstacked(theirs, inside[ours], heads)
    if ours in inside:
        return {theirs: _formed(inside[ours], None, architecture, ours, heads)}
    return _part_of_fused(theirs, ours, architecture, inside, heads)


def _unstacked(theirs: str, info: TensorInfo, heads: Heads) -> dict[str, Stored]:
    """A vector for each head, which the file has as the rows of one tensor."""
    if len(info.shape) != 2 or info.shape[0] not in heads:
        raise ValueError(f"tensor {info.name} has shape {list(info.shape)}, a row for each head was expected")
    return {
        theirs.replace("{h}", str(h)): Stored(info.name, info.shape[1:], np.array([h])) for h in range(info.shape[0])
    }


def _part_of_fused(
    theirs: str, ours: str, architecture: Architecture, inside: Tensors, heads: Heads
) -> dict[str, Stored]:
    """q, k or v of a file that has them in one tensor: all of q, then k, then v."""
    stem = _stem(ours)
    info = inside.get(ours.replace(stem, "attn_qkv"))
    if stem not in _PARTS or info is None:
        return {}
    size, rest = divmod(info.shape[0], heads.queries + 2 * heads.keys)
    if rest:
        raise ValueError(f"tensor {info.name} has {info.shape[0]} rows, which {heads} do not divide")
    counts = [heads.queries * size, heads.keys * size, heads.keys * size]
    part = _PARTS.index(stem)
    return {theirs: _formed(info, (sum(counts[:part]), counts[part]), architecture, ours, heads)}


def _formed(
    info: TensorInfo, part: tuple[int, int] | None, architecture: Architecture, called: str, heads: Heads
) -> Stored:
    """A tensor of the file, or that part of it (first row, how many), with what was done to `called` undone."""
    form, (first, count) = form_of(architecture, called), part or (0, info.shape[0])
    if count > _MOST_ROWS:
        raise ValueError(f"tensor {info.name} has {count} rows")
    shape = (count, *info.shape[1:])
    if form.order is None and part is None:
        return Stored(info.name, shape, plus_one=form.plus_one)
    try:
        rows = np.arange(count) if form.order is None else form.order(count, heads)
    except ValueError as e:
        raise ValueError(f"tensor {called} has {e}") from e
    return Stored(info.name, shape, first + rows, form.plus_one)
