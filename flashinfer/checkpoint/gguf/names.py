"""Which tensor of a GGUF file, or which part of it, each tensor is that a layout names. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.gguf.architecture import Architecture
from flashinfer.checkpoint.gguf.description import Description
from flashinfer.checkpoint.gguf.experts import OF_EXPERTS, Stacked, Tensors, each_expert, stacked
from flashinfer.checkpoint.gguf.forms import Form, Heads
from flashinfer.layout import Layout
from flashinfer.layout.resolve import Resolver
from flashinfer.layout.view import Index

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

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        return (self.name,)

    def dtype(self, inside: Tensors) -> str:
        """Of its values."""
        return "f32" if self.plus_one else inside[self.name].dtype


def stored_tensors(
    of: Description, layout: Layout, config: Mapping[str, Any], inside: Tensors
) -> dict[str, Stored | Stacked]:
    """By the names of the layout; a tensor it has no place for keeps its own.

    Args:
        of: what the file says.
        layout: that of its architecture.
        config: what config.json says.
        inside: the file's tensors by GGUF's names, transposed ones already as the layout wants them, experts apart.

    Raises:
        ValueError: more layers than tensors, heads that do not divide a tensor's rows, or experts that are not alike.
        LayoutError: the layout cannot follow the config.
    """
    if not 0 < of.layers <= len(inside):
        raise ValueError(f"it says {of.layers} layers for {len(inside)} tensors")
    table = get_tensor_name_map(next(k for k, v in MODEL_ARCH_NAMES.items() if v == of.name), of.layers)
    found: dict[str, Stored | Stacked] = {}
    for template in _templates(layout, config):
        for i in range(of.layers) if "{i}" in template else (0,):
            theirs = [template.replace("{prefix}", prefix).replace("{i}", str(i)) for prefix in layout.prefixes]
            found |= _place(theirs, of.architecture, table, inside, of.heads)
    placed = {name for some in found.values() for name in some.names}
    return found | {n: Stored(n, info.shape) for n, info in inside.items() if n not in placed}


def form_of(architecture: Architecture, name: str) -> Form:
    """What the file has done to its tensor of that name."""
    stem = _stem(name)
    return architecture.forms.get(f"{stem}.{name.rpartition('.')[2]}") or architecture.forms.get(stem, Form())


def _templates(layout: Layout, config: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tensors that such a model has."""
    resolver, experts = Resolver(layout, config), layout.experts
    for pattern in (*layout.tensors.values(), *(experts.tensors.values() if experts is not None else ())):
        yield from [name for name, when in pattern.candidates if resolver.holds(when)][:1]
    for neurons in experts.neurons.values() if experts is not None else ():
        yield from (name for name in (neurons.name, neurons.shared) if name is not None)


def _stem(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _place(
    names: Sequence[str], architecture: Architecture, table: TensorNameMap, inside: Tensors, heads: Heads
) -> Mapping[str, Stored | Stacked]:
    """Where a tensor of a layout lies, if it does; all of them where its name counts experts, or rows of one tensor.

    `names`: what the layout calls it, with each of its prefixes; the library knows some without.
    """
    theirs, called = names[0], _called(names, architecture, table)
    if not called:
        return {}
    ours = called[0]
    if "{e}" in theirs:
        parts = enumerate(each_expert(ours, inside))
        return {theirs.replace("{e}", str(e)): Stored(part, inside[part].shape) for e, part in parts}
    if OF_EXPERTS in ours:
        whole = stacked(called, inside)
        return {} if whole is None else {theirs: whole}
    if "{h}" in theirs and ours in inside:
        return _unstacked(theirs, inside[ours], heads)
    if ours in inside:
        return {theirs: _formed(inside[ours], None, architecture, ours, heads)}
    return _part_of_fused(theirs, ours, architecture, inside, heads)


def _called(names: Sequence[str], architecture: Architecture, table: TensorNameMap) -> list[str]:
    """What the file calls a tensor of a layout, less what counts in its name; several where it is made of several.

    Empty: the library does not know it.
    """
    for part, instead in {".{e}": "", **architecture.stacked}.items():
        names = [name.replace(part, instead) for name in names]
    part, several = next((entry for entry in architecture.fused.items() if entry[0] in names[0]), ("", ("",)))
    found: list[str] = []
    for each in several:
        known = (table.get_name(name.replace(part, each), try_suffixes=(".weight", ".bias")) for name in names)
        found += [name for name in known if name is not None][:1]
    return found


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
    if form.one_row:
        return Stored(info.name, (1, info.shape[-1]))
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
