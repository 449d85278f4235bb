"""From a layout and a config.json to the facts of one model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flashinfer.errors import LayoutError
from flashinfer.layout.expression import parse_expression
from flashinfer.layout.schema import Condition, Layout, RopeSource, Source
from flashinfer.store.check import check_facts
from flashinfer.store.facts import Facts, Rope

_ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
              "original_max_position_embeddings", "partial_rotary_factor"}  # fmt: skip

Config = Mapping[str, Any]


class Resolver:
    """The values one config.json gives to the facts and conditions of a layout."""

    def __init__(self, layout: Layout, config: Config) -> None:
        self.layout, self.config = layout, config
        self._values: dict[str, Any] = {}
        self._pending: set[str] = set()

    def facts(self) -> Facts:
        """The facts of this model. Raises LayoutError for anything the layout or the decoder cannot follow."""
        self._check_supported()
        values = {name: self.value(name) for name in self.layout.facts}
        rope = None if self.layout.rope is None else self._rope(self.layout.rope, values)
        try:
            facts = msgspec.convert({"family": self.layout.family, **values, "rope": rope}, Facts)
        except msgspec.ValidationError as e:
            raise self._unfit(str(e)) from e
        check_facts(facts, self._need)
        return facts

    def _need(self, condition: bool, what: str) -> None:
        if not condition:
            raise self._unfit(what)

    def _unfit(self, what: str) -> LayoutError:
        return LayoutError(
            f"config.json does not fit layout {self.layout.family}: {what}; correct it, or see docs/layouts.md"
        )

    def value(self, name: str) -> Any:
        """Value of a fact; computed once."""
        if name in self._values:
            return self._values[name]
        if name in self._pending:
            raise LayoutError(f"layout {self.layout.family}: fact {name} is defined by itself")
        self._pending.add(name)
        source = self.layout.facts[name]
        self._values[name] = self._from(source, name) if isinstance(source, Source) else source
        self._pending.discard(name)
        return self._values[name]

    def size(self, text: str) -> int:
        """Value of an expression over facts."""
        try:
            return parse_expression(text).evaluate(self._count)
        except ValueError as e:
            raise self._unfit(str(e)) from e

    def holds(self, when: tuple[str, ...]) -> bool:
        """Whether all conditions hold; `not X` is the opposite of X."""
        return all(self._condition(w.removeprefix("not ")) != w.startswith("not ") for w in when)

    def _count(self, name: str) -> int:
        value = self.value(name)
        if type(value) is not int:
            raise ValueError(f"{name} is {value!r}, a whole number was expected")
        return value

    def _condition(self, name: str) -> bool:
        condition = self.layout.conditions.get(name)
        if condition is None:
            value = self.value(name)
        elif condition.differ is not None:
            first, second = condition.differ
            value = self.value(first) != self.value(second)
        else:
            value = self._from(_as_source(condition), name)
        if not isinstance(value, bool):
            raise LayoutError(f"config.json: {name} is {value!r}, true or false was expected")
        return value

    def _from(self, source: Source, name: str) -> Any:
        if source.when is not None:
            return self.holds(source.when)
        value = None if source.key is None else self.config.get(source.key)
        if value is None and source.expr is not None:
            return self.size(source.expr)
        if value is None:
            value = source.default
        if value is None:
            raise LayoutError(f"config.json has no {source.key!r}, which layout {self.layout.family} needs for {name}")
        if source.map is None:
            return value
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text not in source.map:
            raise LayoutError(
                f"config.json says {source.key} = {text!r}; layout {self.layout.family} supports "
                f"{', '.join(source.map)}"
            )
        return source.map[text]

    def _check_supported(self) -> None:
        for key, values in self.layout.supported.items():
            value = self.config.get(key)
            if value is not None and not any(value == v and type(value) is type(v) for v in values):
                wanted = " or ".join(repr(v) for v in values) or "nothing"
                raise self._unfit(f"it says {key} = {str(value)[:80]}, only {wanted} is supported there")

    def _rope(self, source: RopeSource, values: Mapping[str, Any]) -> Rope:
        table: Any = next((self.config[key] for key in source.parameters if self.config.get(key)), {})
        if not isinstance(table, dict) or not set(table) <= _ROPE_KEYS:
            raise self._unfit(f"rope parameters {str(table)[:120]} are not understood")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise self._unfit(f"rope type {str(kind)[:40]!r}; {', '.join(_ROPE_TYPES)} are supported")
        if table.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._unfit(f"partial_rotary_factor {table['partial_rotary_factor']} is not supported")
        fields: dict[str, Any] = {
            "theta": table.get("rope_theta") or self._from(source.theta, "rope theta"),
            "rotary_dim": self.size(source.rotary_dim),
        }
        if kind != "default":
            fields |= {"scaling": kind, "factor": table.get("factor")}
        if kind == "llama3":
            fields |= {k: table.get(k) for k in ("low_freq_factor", "high_freq_factor")}
            original = table.get("original_max_position_embeddings", values["context_length"])
            fields["original_context"] = original
        try:
            return msgspec.convert(fields, Rope)
        except msgspec.ValidationError as e:
            raise self._unfit(f"rope parameters: {e}") from e


def _as_source(condition: Condition) -> Source:
    return Source(key=condition.key, default=condition.default)
