"""A layout file: TOML -> frozen `Layout`, every key known or an error. `docs/layouts.md` explains each."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from flashinfer.errors import LayoutError
from flashinfer.layout.expression import Expression, parse_expression
from flashinfer.store.facts import Experts, Facts

SCHEMA = 1
_OWN_TABLES = ("family", "rope", "local_rope", "window", "global_layers", "experts")
"""Facts that a layout says elsewhere: at its head, in `[rope]`, `[window]` and `[experts]`."""
_REQUIRED_FACTS = {f.name for f in msgspec.structs.fields(Facts) if f.required and f.name not in _OWN_TABLES}
_FACTS = {f.name for f in msgspec.structs.fields(Facts) if f.name not in _OWN_TABLES}
_EXPERT_FACTS = {f.name for f in msgspec.structs.fields(Experts) if f.name != "dense"}
_REQUIRED_EXPERT_FACTS = {f.name for f in msgspec.structs.fields(Experts) if f.required}
EXPERT = "expert_"
"""Before the name of a fact of experts, in expressions."""

Scalar = bool | int | float | str


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen, and an unknown key is an error."""


class Source(_Strict, frozen=True):
    """Where a value comes from: config key `key` (of several the first that is there), translated by `map`; `default`
    or `expr` where it is absent.

    A null in config.json counts as absent. `expr` alone (no `key`) is always computed; `when` alone is true where
    all its conditions hold. In a list of sources `when` says where one counts. `power`: the value to that power.
    `times`: multiplied by that. `rounded`: to the type that config.json says the weights have. `optional`: there need
    be no value, and a null says that there is none.
    """

    key: str | tuple[str, ...] | None = None
    default: Scalar | None = None
    expr: str | None = None
    map: dict[str, Scalar] | None = None
    when: tuple[str, ...] | None = None
    power: float | None = None
    times: Source | None = None
    rounded: bool = False
    optional: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys, in the order in which they count."""
        return () if self.key is None else (self.key,) if isinstance(self.key, str) else self.key


class RotatedLayers(_Strict, frozen=True):
    """Layers that use rotary positions: config key `flags` lists one flag for each.

    Without it, every `interval`-th layer uses none.
    """

    flags: str
    interval: Source


class Condition(_Strict, frozen=True):
    """A yes or no: a config key (with a default) that is boolean or `equals` that, or whether two facts differ."""

    key: str | None = None
    default: Scalar | None = None
    equals: Scalar | None = None
    differ: tuple[str, str] | None = None


class RopeSource(_Strict, frozen=True):
    """Rotary positions: `parameters` lists the config keys of scaling tables, the first one present counts.

    Where not all of `when` hold there are none. Of `rotary_dim` values a share `partial` is turned, where it is given
    here or in the table. `local_theta`: layers with a window have a rope of their own (Gemma 3), unscaled unless the
    table says so.
    """

    theta: Source
    rotary_dim: str | Source
    parameters: tuple[str, ...] = ()
    partial: Source | None = None
    layers: RotatedLayers | None = None
    local_theta: Source | None = None
    when: tuple[str, ...] = ()


class WindowSource(_Strict, frozen=True):
    """How far attention looks back: `size` positions, where there is a size and all of `when` hold.

    `layers` is the config key of a list with `sliding_attention` or `full_attention` for each layer. Where it is
    absent, layers before `first` and every `interval`-th layer see all.
    """

    size: Source
    when: tuple[str, ...] = ()
    layers: str | None = None
    first: Source | None = None
    interval: Source | None = None


class Alternative(_Strict, frozen=True):
    """A tensor that plays a role where the one before it does not."""

    name: str
    when: tuple[str, ...] = ()


class TensorPattern(_Strict, frozen=True):
    """The checkpoint's name for a role, its shape there, and when it must be there.

    `when` names conditions that must all hold (`not X` for the opposite); where they do not, the first tensor of
    `otherwise` whose own conditions hold plays the role, if there is one. `optional` tensors may be absent.
    The rest says what is taken of tensors of the shape `of`: `transposed` ones are `[in, out]`; `rows` (start, stop)
    of each of `groups` equal parts; `interleaved` rows of heads are put in halves; `plus` is added to vectors;
    `each` is how many vectors `{h}` in the name stands for.
    """

    name: str
    shape: tuple[str, ...]
    when: tuple[str, ...] = ()
    otherwise: tuple[Alternative, ...] = ()
    optional: bool = False
    of: tuple[str, ...] | None = None
    transposed: bool = False
    rows: tuple[str, str] | None = None
    groups: str = "1"
    interleaved: bool = False
    plus: float = 0.0
    each: str | None = None

    @property
    def candidates(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Names of tensors that may play the role, with their conditions: the first whose conditions hold does."""
        return ((self.name, self.when), *((other.name, other.when) for other in self.otherwise))

    @property
    def plain(self) -> bool:
        """Whether the role is the checkpoint's tensor as it is."""
        taken = self.transposed or self.rows is not None or self.interleaved or self.plus != 0.0
        return not taken and self.of is None and self.each is None


class ExpertPattern(_Strict, frozen=True):
    """What a role of a layer of experts is made of: a tensor for each (`{e}` in the name counts them), or one for all,
    whose first axis they are.

    `shape` is what one expert gives, a matrix or a vector. The rest says how, of a tensor of the shape `of` for each: a
    `transposed` one is `[in, out]`; `rows` (start, stop), and of these each `every`-th one. `shared` is the tensor of
    the shared experts, where there are any. `otherwise` is what counts where there is no tensor of that name.
    """

    name: str
    shape: tuple[str, ...]
    of: tuple[str, ...] | None = None
    transposed: bool = False
    rows: tuple[str, str] | None = None
    every: int = 1
    shared: str | None = None
    otherwise: ExpertPattern | None = None

    @property
    def candidates(self) -> tuple[ExpertPattern, ...]:
        """This, and what counts in its place: the first whose tensors are there does."""
        return (self, *(() if self.otherwise is None else self.otherwise.candidates))


class ExpertLayers(_Strict, frozen=True):
    """Which layers are dense: those that config key `dense` lists, those before `first`, and of the others all but
    each `step`-th one, counted from the beginning."""

    dense: str | None = None
    first: Source = Source(default=0)
    step: Source = Source(default=1)


class ExpertsSource(_Strict, frozen=True):
    """A mixture of experts: its facts, and the roles that its layers have beside those of `Layout.tensors`, or in
    place of them: `tensors` as there, and `neurons`, which experts have each for themselves."""

    facts: dict[str, Scalar | Source]
    tensors: dict[str, TensorPattern]
    neurons: dict[str, ExpertPattern]
    layers: ExpertLayers = ExpertLayers()


class Ignored(_Strict, frozen=True):
    """Tensors that may be in a checkpoint and carry nothing the model needs; `{any}` stands for any text."""

    name: str
    when: tuple[str, ...] = ()


class Layout(_Strict, frozen=True):
    """A model family, as its file states it. `{prefix}` and `{i}` stand in names for a prefix and a layer.

    `table`: the table of config.json that is about the text model, where there is one: what it says comes before what
    is said beside it.
    """

    schema: int
    family: str
    architectures: tuple[str, ...]
    facts: dict[str, Scalar | Source | tuple[Source, ...]]
    tensors: dict[str, TensorPattern]
    prefixes: tuple[str, ...] = ("",)
    table: str | None = None
    supported: dict[str, tuple[Scalar, ...]] = {}
    conditions: dict[str, Condition] = {}
    ignored: tuple[Ignored, ...] = ()
    rope: RopeSource | None = None
    window: WindowSource | None = None
    experts: ExpertsSource | None = None


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
    for name, source in layout.facts.items():
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


def _sources(layout: Layout) -> list[tuple[str, Source]]:
    """Every source of a fact, with the fact's name."""
    found = [(name, (s,) if isinstance(s, Source) else s) for name, s in layout.facts.items()]
    return [(name, s) for name, some in found if isinstance(some, tuple) for s in some]


def _expressions(layout: Layout, where: str) -> list[tuple[str, Expression]]:
    sources = [s for _, s in _sources(layout)]
    sources += [s.times for s in sources if s.times is not None]
    texts = [s.expr for s in sources if s.expr is not None]
    for _, p in _patterns(layout):
        texts += [*p.shape, *(p.of or ()), *(p.rows or ()), p.groups, *([] if p.each is None else [p.each])]
    if layout.experts is not None:
        texts += [s.expr for s in layout.experts.facts.values() if isinstance(s, Source) and s.expr is not None]
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
