"""A layout file: TOML -> `Layout`, checked for what its types cannot say."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from flashinfer.errors import LayoutError
from flashinfer.layout.expression import Expression, parse_expression
from flashinfer.layout.schema import (
    EXPERT,
    LATENT,
    ExpertPattern,
    ExpertsSource,
    Layout,
    Scalar,
    Source,
    TensorPattern,
)
from flashinfer.store.facts import Experts, Facts, Latent

SCHEMA = 1
_OWN_TABLES = ("family", "rope", "local_rope", "window", "global_layers", "experts", "latent")
"""Facts that a layout says elsewhere: at its head, in `[rope]`, `[window]`, `[experts]` and `[latent]`."""
_REQUIRED_FACTS = {f.name for f in msgspec.structs.fields(Facts) if f.required and f.name not in _OWN_TABLES}
_FACTS = {f.name for f in msgspec.structs.fields(Facts) if f.name not in _OWN_TABLES}
_EXPERT_FACTS = {f.name for f in msgspec.structs.fields(Experts) if f.name != "dense"}
_REQUIRED_EXPERT_FACTS = {f.name for f in msgspec.structs.fields(Experts) if f.required}
_LATENT_FACTS = {f.name for f in msgspec.structs.fields(Latent)}
_REQUIRED_LATENT_FACTS = {f.name for f in msgspec.structs.fields(Latent) if f.required}


def read_layout(path: Path) -> Layout:
    """Read and check a layout file.

    Raises:
        LayoutError: it cannot be read, is no TOML, or breaks the schema; says where.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise LayoutError(f"layout {path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise LayoutError(f"layout {path} is not valid TOML: {e}") from e
    return parse_layout(table, str(path))


def parse_layout(table: dict[str, Any], where: str) -> Layout:
    """A checked layout from parsed TOML; `where` names it in errors. Raises LayoutError."""
    if table.get("schema") != SCHEMA:
        raise LayoutError(f"layout {where} has schema {table.get('schema')!r}; this version reads schema {SCHEMA}")
    try:
        layout = msgspec.convert(table, Layout)
    except msgspec.ValidationError as e:
        raise LayoutError(f"layout {where}: {e}; see docs/layouts.md") from e
    _check(layout, where)
    return layout


def _check(layout: Layout, where: str) -> None:
    """What the types cannot say."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise LayoutError(f"layout {where}: {what}; see docs/layouts.md")

    facts = set(layout.facts)
    need(facts <= _FACTS, f"unknown fact {', '.join(sorted(facts - _FACTS))}")
    need(facts >= _REQUIRED_FACTS, f"missing fact {', '.join(sorted(_REQUIRED_FACTS - facts))}")
    need(bool(layout.architectures) and bool(layout.prefixes), "architectures and prefixes must not be empty")
    for name, source in _all_facts(layout).items():
        if isinstance(source, tuple):
            need(source != () and not source[-1].when, f"fact {name} has no source that always counts, at its end")
        elif isinstance(source, Source):
            sources = (source.key is not None or source.expr is not None) + (source.when is not None)
            need(sources == 1, f"fact {name} must have either key or expr, or when")
            need(source.default is None or source.expr is None, f"fact {name} has both default and expr")
    for name, c in layout.conditions.items():
        need((c.key is None) != (c.differ is None), f"condition {name} must have either key or differ")
        need(c.differ is None or set(c.differ) <= facts, f"condition {name} compares unknown facts")
        need(name not in facts, f"condition {name} has the name of a fact")
    known = set(layout.conditions) | facts
    if layout.experts is not None:
        _check_experts(layout.experts, need)
        facts |= {EXPERT + name for name in layout.experts.facts}
    if layout.latent is not None:
        named = set(layout.latent)
        need(named <= _LATENT_FACTS, f"unknown fact of latent attention {', '.join(sorted(named - _LATENT_FACTS))}")
        need(named >= _REQUIRED_LATENT_FACTS, "latent attention lacks a fact")
        facts |= {LATENT + name for name in layout.latent}
    for role, pattern in _patterns(layout):
        _check_tensor(layout, role, pattern, need)
    dependent = [named for _, p in _patterns(layout) for named in p.candidates]
    dependent += [(entry.name, entry.when) for entry in layout.ignored]
    dependent += [(f"fact {name}", s.when or ()) for name, s in _sources(layout)]
    dependent += [(name, t.when) for name, t in (("rope", layout.rope), ("window", layout.window)) if t is not None]
    for name, when in dependent:
        unknown = {w.removeprefix("not ") for w in when} - known
        need(not unknown, f"{name} depends on the unknown condition {', '.join(sorted(unknown))}")
    for text, expression in _expressions(layout, where):
        need(expression.names <= facts, f"{text!r} names a fact that is not there")


def _patterns(layout: Layout) -> list[tuple[str, TensorPattern]]:
    experts = {} if layout.experts is None else layout.experts.tensors
    return [*layout.tensors.items(), *experts.items()]


def _check_experts(experts: ExpertsSource, need: Callable[[bool, str], None]) -> None:
    facts = set(experts.facts)
    need(facts <= _EXPERT_FACTS, f"unknown fact of experts {', '.join(sorted(facts - _EXPERT_FACTS))}")
    missing = _REQUIRED_EXPERT_FACTS - facts
    need(not missing, f"missing fact of experts {', '.join(sorted(missing))}")
    need(all("{i}" in role for role in (*experts.tensors, *experts.neurons)), "a role of experts is one of a layer")
    for role, p in _expert_patterns(experts):
        need("{i}" in p.name and (p.shared is None or "{i}" in p.shared), f"tensor {role}: its names lack {{i}}")
        need(p.every > 0, f"tensor {role} takes every {p.every}-th row")
        sides = 1 if role.endswith(".bias") else 2
        need(all(len(s) == sides for s in (p.shape, p.of or p.shape)), f"tensor {role} has other than {sides} sides")
        need(sides == 2 or not p.transposed, f"tensor {role}: a vector cannot be transposed")


def _expert_patterns(experts: ExpertsSource) -> list[tuple[str, ExpertPattern]]:
    return [(role, each) for role, p in experts.neurons.items() for each in p.candidates]


def _check_tensor(layout: Layout, role: str, pattern: TensorPattern, need: Callable[[bool, str], None]) -> None:
    p, vector = pattern, len(pattern.shape) == 1
    for name, _ in p.candidates:
        need(("{i}" in role) == ("{i}" in name), f"tensor {role}: role and name disagree about {{i}}")
    need(p.otherwise == () or p.when != (), f"tensor {role} has otherwise and no when")
    need(p.shape != (), f"tensor {role} has no shape")
    need(vector or (p.plus == 0.0 and p.each is None), f"tensor {role}: only vectors have plus and each")
    need(("{h}" in p.name) == (p.each is not None), f"tensor {role}: name and each disagree about {{h}}")
    need(p.groups == "1" or p.rows is not None, f"tensor {role} has groups and no rows")
    need(not (vector and p.transposed), f"tensor {role}: a vector cannot be transposed")
    need(not p.interleaved or layout.rope is not None, f"tensor {role} is interleaved without [rope]")
    need(p.interleaved or not (p.turned_last or p.head), f"tensor {role} has heads and is not interleaved")


def _all_facts(layout: Layout) -> dict[str, Scalar | Source | tuple[Source, ...]]:
    """Those of experts and of latent attention, too, by their names in expressions."""
    experts = {} if layout.experts is None else layout.experts.facts
    found = layout.facts | {EXPERT + name: source for name, source in experts.items()}
    return found | {LATENT + name: source for name, source in (layout.latent or {}).items()}


def _sources(layout: Layout) -> list[tuple[str, Source]]:
    """Every source of a fact, with the fact's name."""
    found = [(name, (s,) if isinstance(s, Source) else s) for name, s in _all_facts(layout).items()]
    return [(name, s) for name, some in found if isinstance(some, tuple) for s in some]


def _expressions(layout: Layout, where: str) -> list[tuple[str, Expression]]:
    sources = [s for _, s in _sources(layout)]
    sources += [s.times for s in sources if s.times is not None]
    texts = [s.expr for s in sources if s.expr is not None]
    for _, p in _patterns(layout):
        single = (text for text in (p.each, p.head) if text is not None)
        texts += [*p.shape, *(p.of or ()), *(p.rows or ()), p.groups, *single]
    if layout.experts is not None:
        for _, e in _expert_patterns(layout.experts):
            texts += [*e.shape, *(e.of or ()), *(e.rows or ())]
    if layout.rope is not None and (turned := layout.rope.rotary_dim):
        texts += [turned] if isinstance(turned, str) else [turned.expr] if turned.expr else []
    try:
        return [(text, parse_expression(text)) for text in texts]
    except ValueError as e:
        raise LayoutError(f"layout {where}: {e}; see docs/layouts.md") from e


@cache
def known_layouts() -> tuple[Layout, ...]:
    """Every layout that ships, by family: from the wheel, or from `layouts/` of a source checkout.

    Raises:
        LayoutError: one of them breaks the schema, or the installation lost them.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "layouts", package.parent / "layouts"):
        files = sorted(directory.glob("*.toml"))
        if files:
            return tuple(read_layout(path) for path in files)
    raise LayoutError(f"no layouts beside {package}; the installation is incomplete: install it again")
