"""Which layout a checkpoint follows, and which of its tensors plays which role. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashinfer.errors import LayoutError
from flashinfer.layout.experts import Checked, joined_roles
from flashinfer.layout.read import known_layouts
from flashinfer.layout.resolve import Resolver
from flashinfer.layout.schema import Layout, TensorPattern
from flashinfer.layout.view import Joined, View, in_halves, taken_rows
from flashinfer.store.facts import Facts
from flashinfer.store.roles import is_required, role_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """What a layout says of one checkpoint: its facts, and the tensor that plays each role, in order of use.

    A source that `views` has is not a tensor of the checkpoint, but cut out of such.
    """

    layout: Layout
    facts: Facts
    sources: dict[str, str]
    views: dict[str, View | Joined]


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
    joined = joined_roles(resolver, facts, Checked(shapes, prefix, lambda what: _mismatch(layout, shapes, what)))
    declared = _declared(layout, resolver, facts, prefix, len(shapes))
    found = _found(layout, {r: d for r, d in declared.items() if r not in joined}, shapes, facts, joined)
    used = {name for some in (found, joined) for d in some.values() for name in d.names}
    _check_extra(layout, resolver, prefix, shapes, used)
    sources: dict[str, str] = {}
    views: dict[str, View | Joined] = {}
    for role in (role for role in expected if role in found or role in joined):
        view: View | Joined | None = joined.get(role)
        names = (found[role] if view is None else view).names
        if view is None:
            _check_shape(layout, resolver, role, found[role], shapes, expected[role])
            view = None if found[role].pattern.plain else _view(layout, resolver, role, found[role], facts)
        elif view.shape != expected[role]:
            raise LayoutError(f"layout {layout.family} gives {role} the shape {view.shape}, not {expected[role]}")
        sources[role] = names[0] if view is None else f"{names[0]}#{role}"
        if view is not None:
            views[sources[role]] = view
    return Match(layout, facts, sources, views)


def _found(
    layout: Layout, declared: dict[str, _Declared], shapes: Shapes, facts: Facts, joined: Collection[str]
) -> dict[str, _Declared]:
    """Of the roles declared, those whose tensors are there. Raises LayoutError where one is missing that must be."""
    found: dict[str, _Declared] = {}
    for role in role_shapes(facts):
        d = declared.pop(role, None)
        if d is not None and all(name in shapes for name in d.names):
            found[role] = d
        elif d is not None and not d.pattern.optional:
            missing = next(name for name in d.names if name not in shapes)
            raise _mismatch(layout, shapes, f"tensor {missing} (role {role}) is missing")
        elif d is None and role not in joined and is_required(role, facts):
            raise _mismatch(layout, shapes, f"a tensor for role {role} is missing")
    if declared:
        raise LayoutError(f"layout {layout.family} declares {next(iter(declared))}, a role such a model has not")
    return found


def views_of(layout: Layout, config: Mapping[str, Any], names: Collection[str]) -> tuple[Facts, dict[str, View]]:
    """What a layout cuts out of the tensors of a checkpoint, by role, whose shapes are not at hand; with its facts.

    Raises:
        LayoutError: an unsupported fact, or views that cannot be.
    """
    resolver = Resolver(layout, config)
    facts, prefix = resolver.facts(), _best_prefix(layout, names)
    declared = _declared(layout, resolver, facts, prefix, len(names))
    cut = {role: d for role, d in declared.items() if not d.pattern.plain}
    return facts, {role: _view(layout, resolver, role, d, facts) for role, d in cut.items()}


def nearest(names: Collection[str], layouts: Sequence[Layout] | None = None) -> str:
    """`nearest layout: llama (matches 97 %)`: by share of the tensor names that fit a pattern, then the shortest."""
    layouts = known_layouts() if layouts is None else layouts
    share, _, family = max((_share(layout, names), -len(_names(layout)), layout.family) for layout in layouts)
    return f"nearest layout: {family} (matches {100 * share:.0f} %)"


def _mismatch(layout: Layout, shapes: Shapes, what: str) -> LayoutError:
    return LayoutError(
        f"the checkpoint does not fit layout {layout.family}: {what}; {nearest(shapes)}: "
        "download it again, or see docs/layouts.md"
    )


@dataclass(frozen=True)
class _Declared:
    """What a layout declares for a role, and the names that stand for."""

    pattern: TensorPattern
    names: tuple[str, ...]


def _declared(layout: Layout, resolver: Resolver, facts: Facts, prefix: str, tensors: int) -> dict[str, _Declared]:
    """By role, but for those that conditions rule out; `tensors` is how many the checkpoint has."""
    found = {}
    everywhere = list(range(facts.num_layers))
    routed = [i for i in everywhere if facts.routed(i) is not None]
    patterns = [(role, pattern, everywhere) for role, pattern in layout.tensors.items()]
    patterns += [(r, p, routed) for r, p in layout.experts.tensors.items()] if layout.experts is not None else []
    for role, pattern, layers in patterns:
        template = next((name for name, when in pattern.candidates if resolver.holds(when)), None)
        if template is None:
            continue
        each = 1 if pattern.each is None else resolver.size(pattern.each)
        if each > tensors:
            raise resolver.unfit(f"{pattern.each} is {each} for {tensors} tensors")
        for i in layers if "{i}" in role else (0,):
            name = template.replace("{prefix}", prefix).replace("{i}", str(i))
            found[role.replace("{i}", str(i))] = _Declared(
                pattern, tuple(name.replace("{h}", str(h)) for h in range(each))
            )
    return found


def _view(layout: Layout, resolver: Resolver, role: str, d: _Declared, facts: Facts) -> View:
    p = d.pattern
    of = tuple(resolver.size(text) for text in p.of or p.shape)
    shape = tuple(resolver.size(text) for text in p.shape)
    total = math.prod(of) * len(d.names) if len(shape) == 1 else of[1 if p.transposed else 0]
    start, stop = (resolver.size(text) for text in p.rows or ("0", str(total)))
    try:
        rows = taken_rows(total, resolver.size(p.groups), start, stop)
        if p.interleaved:
            assert facts.rope is not None
            head = facts.head_dim if p.head is None else resolver.size(p.head)
            rows = in_halves(rows, head, facts.rope.rotary_dim, last=p.turned_last)
    except ValueError as e:
        raise LayoutError(f"layout {layout.family}: tensor {role}: {e}; see docs/layouts.md") from e
    width = () if len(shape) == 1 else (of[0 if p.transposed else 1],)
    if (len(rows), *width) != shape:
        raise LayoutError(f"layout {layout.family} takes {[len(rows), *width]} for {role}, not {list(shape)}")
    return View(d.names, shape, rows, p.transposed, p.plus)


def _check_extra(layout: Layout, resolver: Resolver, prefix: str, shapes: Shapes, used: set[str]) -> None:
    beyond = str(resolver.value("num_layers"))
    ignored = [_regex(g.name.replace("{n}", beyond), prefix) for g in layout.ignored if resolver.holds(g.when)]
    extra = [n for n in shapes if n not in used and not any(r.fullmatch(n) for r in ignored)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise _mismatch(layout, shapes, f"it has no place for tensor {extra[0][:200]}{more}")


def _check_shape(
    layout: Layout, resolver: Resolver, role: str, d: _Declared, shapes: Shapes, expected: tuple[int, ...]
) -> None:
    pattern = d.pattern
    declared = tuple(resolver.size(text) for text in pattern.shape)
    if declared != expected:
        raise LayoutError(f"layout {layout.family} gives {role} the shape {list(declared)}, not {list(expected)}")
    texts = pattern.of or pattern.shape
    wanted = tuple(resolver.size(text) for text in texts)
    for name in d.names:
        if shapes[name] != wanted:
            raise LayoutError(
                f"tensor {name} has shape {list(shapes[name])}, {list(wanted)} = [{', '.join(texts)}] was expected by "
                f"layout {layout.family} and config.json: they do not belong together; download both again"
            )


def _best_prefix(layout: Layout, names: Collection[str]) -> str:
    return max(layout.prefixes, key=lambda prefix: _matching(layout, names, prefix))


def _share(layout: Layout, names: Collection[str]) -> float:
    return max(_matching(layout, names, prefix) for prefix in layout.prefixes) / max(1, len(names))


def _matching(layout: Layout, names: Collection[str], prefix: str) -> int:
    patterns = _names(layout) + [g.name for g in layout.ignored]
    combined = re.compile("|".join(_regex(p, prefix).pattern for p in patterns))
    return sum(combined.fullmatch(name) is not None for name in names)


def _names(layout: Layout) -> list[str]:
    """The patterns of names of a layout's tensors."""
    names = [p.name for p in layout.tensors.values()]
    if (experts := layout.experts) is not None:
        names += [p.name for p in experts.tensors.values()]
        patterns = [each for p in experts.neurons.values() for each in p.candidates]
        names += [name for p in patterns for name in (p.name, p.shared) if name is not None]
    return names


def _regex(pattern: str, prefix: str) -> re.Pattern[str]:
    escaped = re.escape(pattern.replace("{prefix}", prefix))
    return re.compile(re.sub(r"\\\{[ihen]\\\}", r"(?:0|[1-9]\\d*)", escaped).replace(r"\{any\}", ".*"))
