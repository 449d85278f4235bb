"""From a layout and a config.json to the facts of one model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flashinfer.errors import LayoutError
from flashinfer.layout.expression import parse_expression
from flashinfer.layout.rope import read_rope
from flashinfer.layout.schema import Condition, Layout, Source
from flashinfer.store.check import check_facts
from flashinfer.store.facts import Facts

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
        rope = None if self.layout.rope is None else read_rope(self, self.layout.rope)
        window, context = values.get("window"), values["context_length"]
        if type(window) is int and type(context) is int:  # within it, attention sees every position
            values["context_length"] = min(context, window)
        try:
            facts = msgspec.convert({"family": self.layout.family, **values, "rope": rope}, Facts)
        except msgspec.ValidationError as e:
            raise self.unfit(str(e)) from e
        check_facts(facts, self._need)
        return facts

    def _need(self, condition: bool, what: str) -> None:
        if not condition:
            raise self.unfit(what)

    def unfit(self, what: str) -> LayoutError:
        """The error of a config.json that this layout cannot follow, to be raised."""
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
        self._values[name] = self.find(source, name) if isinstance(source, Source) else source
        self._pending.discard(name)
        return self._values[name]

    def size(self, text: str) -> int:
        """Value of an expression over facts."""
        try:
            return parse_expression(text).evaluate(self._count)
        except ValueError as e:
            raise self.unfit(str(e)) from e

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
            value = self.find(_as_source(condition), name)
        if not isinstance(value, bool):
            raise LayoutError(f"config.json: {name} is {value!r}, true or false was expected")
        return value

    def find(self, source: Source, name: str) -> Any:
        """The value a source gives; `name` says of what in errors."""
        if source.when is not None:
            return self.holds(source.when)
        value = None if source.key is None else self.config.get(source.key)
        if value is None and source.expr is not None:
            return self.size(source.expr)
        if value is None:
            value = source.default
        if value is None and source.optional:
            return None
        if value is None:
            raise LayoutError(f"config.json has no {source.key!r}, which layout {self.layout.family} needs for {name}")
        if source.invert:
            return self._inverse(value, name)
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
                raise self.unfit(f"it says {key} = {str(value)[:80]}, only {wanted} is supported there")

    def _inverse(self, value: Any, name: str) -> float:
        if type(value) not in (int, float) or value == 0:
            raise self.unfit(f"{name} is one over {value!r}, a number but 0 was expected")
        return 1.0 / float(value)


def _as_source(condition: Condition) -> Source:
    return Source(key=condition.key, default=condition.default)
