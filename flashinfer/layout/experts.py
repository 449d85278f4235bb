"""Roles of layers of experts: matrices made of many tensors, or of one that holds all experts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashinfer.errors import LayoutError
from flashinfer.layout.resolve import Resolver
from flashinfer.layout.schema import ExpertPattern
from flashinfer.layout.view import Block, Joined
from flashinfer.store.facts import Experts, Facts

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checked:
    """The tensors of a checkpoint, by name; `unfit` makes the error of one that lacks some, or has others."""

    shapes: Shapes
    prefix: str
    unfit: Callable[[str], LayoutError]

    def shape(self, name: str, role: str) -> tuple[int, ...]:
        """Of a tensor that plays a role. Raises LayoutError where it is missing."""
        if name not in self.shapes:
            raise self.unfit(f"tensor {name} (role {role}) is missing")
        return self.shapes[name]


def joined_roles(resolver: Resolver, facts: Facts, tensors: Checked) -> dict[str, Joined]:
    """What plays the roles whose neurons are experts', by role. Raises LayoutError: a tensor is missing, or of another
    shape."""
    experts, source = facts.experts, resolver.layout.experts
    if experts is None or source is None:
        return {}
    found = {}
    for role, pattern in source.neurons.items():
        for i in (i for i in range(facts.num_layers) if facts.routed(i) is not None):
            name = role.replace("{i}", str(i))
            places = [_Names(each, tensors.prefix, i) for each in pattern.candidates]
            there = next((names for names in places if names.fill(names.pattern.name) in tensors.shapes), places[0])
            found[name] = _joined(resolver, experts, name, there, tensors)
    return found


@dataclass(frozen=True)
class _Names:
    """A pattern in one layer."""

    pattern: ExpertPattern
    prefix: str
    layer: int

    def fill(self, template: str, expert: int = 0) -> str:
        """The name that the template stands for."""
        filled = template.replace("{prefix}", self.prefix).replace("{i}", str(self.layer))
        return filled.replace("{e}", str(expert))


def _joined(resolver: Resolver, experts: Experts, role: str, names: _Names, tensors: Checked) -> Joined:
    p, columns = names.pattern, role.endswith("down.weight")
    one = tuple(resolver.size(text) for text in p.shape)
    of = tuple(resolver.size(text) for text in p.of or p.shape)
    stacked, (rows, *more) = "{e}" not in p.name, one
    start, stop = (resolver.size(text) for text in p.rows or ("0", str(of[1 if p.transposed else 0])))
    if len(range(start, stop, p.every)) != rows or one[columns] != experts.size:
        raise LayoutError(f"layout {resolver.layout.family} takes {stop - start} rows for {role}; see docs/layouts.md")
    if not stacked and experts.count > len(tensors.shapes):
        raise tensors.unfit(f"config.json says {experts.count} experts for {len(tensors.shapes)} tensors")
    wanted = (experts.count, *of) if stacked else of
    for e in (0,) if stacked else range(experts.count):
        _check(names.fill(p.name, e), wanted, role, tensors)
    # a vector is a row of its tensor, whose values are rows once it is turned over
    height, turned = (1, True) if len(of) == 1 else (of[0], p.transposed)
    blocks = [
        Block(names.fill(p.name, e), e * height if stacked else 0, height, rows, turned, start, p.every)
        for e in range(experts.count)
    ]
    sizes = [experts.size] * experts.count
    if experts.shared_size and p.shared is not None:
        shape = (rows, experts.shared_size) if columns else (experts.shared_size, *more)
        _check(names.fill(p.shared), shape, role, tensors)
        blocks.append(Block(names.fill(p.shared), 0, height if len(of) == 1 else shape[0], shape[0], len(of) == 1))
        sizes.append(experts.shared_size)
    return Joined(tuple(blocks), tuple(sizes), (rows, sum(sizes)) if columns else (sum(sizes), *more), columns)


def _check(name: str, wanted: tuple[int, ...], role: str, tensors: Checked) -> None:
    found = tensors.shape(name, role)
    if found != wanted:
        raise tensors.unfit(f"tensor {name} has shape {list(found)}, {list(wanted)} was expected for {role}")
