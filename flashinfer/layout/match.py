"""Which layout a checkpoint follows, and which of its tensors plays which role. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashinfer.errors import LayoutError
from flashinfer.layout.resolve import Resolver
from flashinfer.layout.schema import Layout, known_layouts
from flashinfer.store.facts import Facts
from flashinfer.store.roles import is_required, role_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """What a layout says of one checkpoint: its facts, and the tensor that plays each role, in order of use."""

    layout: Layout
    facts: Facts
    sources: dict[str, str]


def find_layout(config: Mapping[str, Any], names: Collection[str]) -> Layout:
    """The layout of the architecture config.json names.

    Raises:
        LayoutError: none knows it; the message lists those that are known and the nearest layout.
    """
    named = config.get("architectures")
    architectures = [a for a in named if isinstance(a, str)] if isinstance(named, list) else []
    layouts = known_layouts()
    for architecture in architectures:
        for layout in layouts:
            if architecture in layout.architectures:
                return layout
    known = ", ".join(a for layout in layouts for a in layout.architectures)
    raise LayoutError(
        f"config.json names the architecture {', '.join(architectures) or 'none'}; known are {known} "
        f"({nearest(names, layouts)}): give --layout FILE, or add a layout (docs/layouts.md)"
    )


def match_layout(layout: Layout, config: Mapping[str, Any], shapes: Shapes) -> Match:
    """Give every tensor its role; `shapes` are those of the checkpoint's tensors by name.

    Raises:
        LayoutError: an unsupported fact, or a tensor that is missing, extra or of another shape; names it.
    """
    resolver = Resolver(layout, config)
    facts = resolver.facts()
    if facts.num_layers > len(shapes):
        raise _mismatch(layout, shapes, f"config.json says {facts.num_layers} layers for {len(shapes)} tensors")
    expected = role_shapes(facts)
    prefix = _best_prefix(layout, shapes)
    names = _names(layout, resolver, facts.num_layers, prefix)
    sources = {}
    for role in expected:
        name, optional = names.pop(role, (None, not is_required(role, facts)))
        if name is not None and name in shapes:
            sources[role] = name
        elif not optional:
            wanted = f"tensor {name} (role {role})" if name else f"a tensor for role {role}"
            raise _mismatch(layout, shapes, f"{wanted} is missing")
    if names:
        raise LayoutError(f"layout {layout.family} declares {next(iter(names))}, a role such a model has not")
    _check_extra(layout, resolver, prefix, shapes, set(sources.values()))
    for role, name in sources.items():
        _check_shape(layout, resolver, role, name, shapes[name], expected[role])
    return Match(layout, facts, sources)


def nearest(names: Collection[str], layouts: Sequence[Layout] | None = None) -> str:
    """`nearest layout: llama (matches 97 %)`: by share of the tensor names that fit a pattern."""
    layouts = known_layouts() if layouts is None else layouts
    shares = [(_share(layout, names), layout.family) for layout in layouts]
    share, family = max(shares)
    return f"nearest layout: {family} (matches {100 * share:.0f} %)"


def _mismatch(layout: Layout, shapes: Shapes, what: str) -> LayoutError:
    return LayoutError(
        f"the checkpoint does not fit layout {layout.family}: {what}; {nearest(shapes)}: "
        "download it again, or see docs/layouts.md"
    )


def _names(layout: Layout, resolver: Resolver, layers: int, prefix: str) -> dict[str, tuple[str | None, bool]]:
    """Role -> the checkpoint's name for it (None where conditions rule it out) and whether it is optional."""
    found: dict[str, tuple[str | None, bool]] = {}
    for role, pattern in layout.tensors.items():
        if not resolver.holds(pattern.when):
            continue
        for i in range(layers) if "{i}" in role else (0,):
            name = pattern.name.replace("{prefix}", prefix).replace("{i}", str(i))
            found[role.replace("{i}", str(i))] = (name, pattern.optional)
    return found


def _check_extra(layout: Layout, resolver: Resolver, prefix: str, shapes: Shapes, used: set[str]) -> None:
    ignored = [_regex(g.name, prefix) for g in layout.ignored if resolver.holds(g.when)]
    extra = [n for n in shapes if n not in used and not any(r.fullmatch(n) for r in ignored)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise _mismatch(layout, shapes, f"it has no place for tensor {extra[0][:200]}{more}")


def _check_shape(
    layout: Layout, resolver: Resolver, role: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    pattern = layout.tensors[re.sub(r"^layers\.\d+\.", "layers.{i}.", role)]
    declared = tuple(resolver.size(text) for text in pattern.shape)
    if declared != expected:
        raise LayoutError(f"layout {layout.family} gives {role} the shape {list(declared)}, not {list(expected)}")
    if shape != expected:
        wanted = f"{list(expected)} = [{', '.join(pattern.shape)}] was expected"
        raise LayoutError(
            f"tensor {name} has shape {list(shape)}, {wanted} by layout {layout.family} and config.json: "
            "they do not belong together; download both again"
        )


def _best_prefix(layout: Layout, names: Collection[str]) -> str:
    return max(layout.prefixes, key=lambda prefix: _matching(layout, names, prefix))


def _share(layout: Layout, names: Collection[str]) -> float:
    return max(_matching(layout, names, prefix) for prefix in layout.prefixes) / max(1, len(names))


def _matching(layout: Layout, names: Collection[str], prefix: str) -> int:
    patterns = [p.name for p in layout.tensors.values()] + [g.name for g in layout.ignored]
    combined = re.compile("|".join(_regex(p, prefix).pattern for p in patterns))
    return sum(combined.fullmatch(name) is not None for name in names)


def _regex(pattern: str, prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern.replace("{prefix}", prefix)).replace(re.escape("{i}"), r"(?:0|[1-9]\d*)"))
