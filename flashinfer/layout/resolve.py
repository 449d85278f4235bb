"""From a layout and a config.json to the facts of one model. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from flashinfer.errors import LayoutError
from flashinfer.layout.expression import parse_expression
from flashinfer.layout.rope import read_rope
from flashinfer.layout.schema import EXPERT, LATENT, Condition, ExpertsSource, Layout, Scalar, Source
from flashinfer.layout.window import read_window
from flashinfer.quant import codec_named
from flashinfer.store.check_facts import check_facts
from flashinfer.store.facts import Facts

Config = Mapping[str, Any]
MOST_LAYERS = 1 << 16
"""More than any model has: a config.json that says so is damaged."""


class Resolver:
    """The values one config.json gives to the facts and conditions of a layout."""

    def __init__(self, layout: Layout, config: Config) -> None:
        self.layout, self.config = layout, _with_table(config, layout.table)
        self._values: dict[str, Any] = {}
        self._pending: set[str] = set()

    def facts(self) -> Facts:
        """The facts of this model. Raises LayoutError for anything the layout or the decoder cannot follow."""
        self._check_supported()
        values = {name: self.value(name) for name in self.layout.facts}
        if self.layout.rope is not None and self.holds(self.layout.rope.when):
            values |= read_rope(self, self.layout.rope)
        values |= {} if self.layout.window is None else read_window(self, self.layout.window)
        if values.get("window") is None:
            values.pop("local_rope", None)
        if self.layout.latent is not None:
            values["latent"] = {name: self.value(LATENT + name) for name in self.layout.latent}
        if self.layout.experts is not None:
            values["experts"] = self._experts(self.layout.experts, values["num_layers"])
        try:
            facts = msgspec.convert({"family": self.layout.family, **values}, Facts)
        except msgspec.ValidationError as e:
            raise self.unfit(str(e)) from e
        check_facts(facts, self._need)
        return facts

    def _experts(self, experts: ExpertsSource, layers: Any) -> dict[str, Any]:
        """The facts of experts, and which layers are dense."""
        kinds = experts.layers
        listed = None if kinds.dense is None else self.config.get(kinds.dense)
        first, step = self.find(kinds.first, "the first layer of experts"), self.find(kinds.step, "layers of experts")
        if not all(type(n) is int for n in (layers, first, step)) or step < 1 or layers > MOST_LAYERS:
            raise self.unfit(f"{layers} layers, from layer {first} on each {step}-th one with experts, cannot be")
        if not isinstance(listed, list | None):
            raise self.unfit(f"it says {kinds.dense} = {str(listed)[:80]}, a list was expected")
        dense = [i for i in range(layers) if i in (listed or ()) or i < first or (i + 1) % step]
        return {name: self.value(EXPERT + name) for name in experts.facts} | {"dense": dense}

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
        source = self._source(name)
        if isinstance(source, tuple):
            counts = next(s for s in source if self.holds(s.when or ()))
            source = msgspec.structs.replace(counts, when=None)
        self._values[name] = self.find(source, name) if isinstance(source, Source) else source
        self._pending.discard(name)
        return self._values[name]

    def _source(self, name: str) -> Scalar | Source | tuple[Source, ...]:
        """Where a fact comes from; those of experts and of latent attention have a prefix."""
        experts, latent = self.layout.experts, self.layout.latent
        if experts is not None and name.startswith(EXPERT):
            return experts.facts[name.removeprefix(EXPERT)]
        if latent is not None and name.startswith(LATENT):
            return latent[name.removeprefix(LATENT)]
        return self.layout.facts[name]

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
        elif condition.there:
            value = self.find(msgspec.structs.replace(_as_source(condition), optional=True), name) is not None
        else:
            value = self.find(_as_source(condition), name)
            value = value if condition.equals is None else value == condition.equals
        if not isinstance(value, bool):
            raise LayoutError(f"config.json: {name} is {value!r}, true or false was expected")
        return value

    def find(self, source: Source, name: str) -> Any:
        """The value a source gives; `name` says of what in errors."""
        if source.when is not None:
            return self.holds(source.when)
        said, value = self._look_up(*source.keys)
        if value is None and not (said and source.optional):
            value = source.default if source.expr is None else self.size(source.expr)
        if value is None and source.optional:
            return None
        if value is None:
            keys = " or ".join(map(repr, source.keys))
            raise LayoutError(f"config.json has no {keys}, which layout {self.layout.family} needs for {name}")
        if source.map is None:
            return self._computed(source, value, name)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text not in source.map:
            raise LayoutError(
                f"config.json says {' or '.join(source.keys)} = {text!r}; layout {self.layout.family} supports "
                f"{', '.join(source.map)}"
            )
        return source.map[text]

    def _look_up(self, *keys: str) -> tuple[bool, Any]:
        """Whether config.json has one of the keys, and the first value that is not null; `a.b` is key b of table a."""
        said = False
        for key in keys:
            *tables, last = key.split(".")
            at: Any = self.config
            for table in tables:
                at = at.get(table) if isinstance(at, Mapping) else None
            there = isinstance(at, Mapping) and last in at
            said = said or there
            if there and at[last] is not None:
                return True, at[last]
        return said, None

    def _check_supported(self) -> None:
        for key, values in self.layout.supported.items():
            _, value = self._look_up(key)
            if value is not None and not any(value == v and type(value) is type(v) for v in values):
                wanted = " or ".join(repr(v) for v in values) or "nothing"
                raise self.unfit(f"it says {key} = {str(value)[:80]}, only {wanted} is supported there")

    def _computed(self, source: Source, value: Any, name: str) -> Any:
        """What a source makes of the number it found."""
        if source.power is None and source.times is None and not source.rounded:
            return value
        factor = 1.0 if source.times is None else self.find(source.times, name)
        try:
            if any(type(number) not in (int, float) for number in (value, factor)):
                raise TypeError
            result = value if source.power is None else math.pow(value, source.power)
            return self._rounded(result * factor) if source.rounded else result * factor
        except (TypeError, ValueError, OverflowError) as e:
            raise self.unfit(f"{name} is computed from {str(value)[:40]}, a positive number was expected") from e

    def _rounded(self, value: float) -> float:
        """To nearest, in the type of the weights; float32 where config.json does not say."""
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        codec = codec_named({"float16": "f16", "bfloat16": "bf16"}.get(dtype, "f32"))
        return float(codec.decode(codec.encode(np.array([[value]], dtype=np.float32)), 1)[0, 0])


def _with_table(config: Config, name: str | None) -> Config:
    """The config with what one of its tables says in place of what is said beside it."""
    table = None if name is None else config.get(name)
    if not isinstance(table, Mapping):
        return config
    return {**config, **{key: value for key, value in table.items() if value is not None or key not in config}}


def _as_source(condition: Condition) -> Source:
    return Source(key=condition.key, default=condition.default)
