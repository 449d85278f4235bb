"""The attention windows of one model, from what a layout says and config.json. Pure."""

from __future__ import annotations

from typing import Any

from flashinfer.layout.schema import Source, WindowSource
from flashinfer.layout.values import Values, layer_count

SLIDING, FULL = "sliding_attention", "full_attention"
"""What transformers calls a layer with a window, and one without."""


def read_window(values: Values, source: WindowSource) -> dict[str, Any]:
    """The facts `window` and `global_layers`. Raises LayoutError for a list of layers that is not understood."""
    size = values.find(source.size, "window") if values.holds(source.when) else None
    count = layer_count(values)
    seeing_all = () if size is None else _global_layers(values, source, count)
    if size is None or len(seeing_all) == count:
        return {"window": None}
    return {"window": size, "global_layers": seeing_all}


def _global_layers(values: Values, source: WindowSource, count: int) -> tuple[int, ...]:
    kinds = None if source.layers is None else values.config.get(source.layers)
    if kinds is None:
        first, interval = _number(values, source.first, 0), _number(values, source.interval, count + 1)
        return tuple(i for i in range(count) if i < first or (i + 1) % interval == 0)
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise values.unfit(f"{source.layers} is not a list of {SLIDING} or {FULL} for each of {count} layers")
    return tuple(i for i, kind in enumerate(kinds) if kind == FULL)


def _number(values: Values, source: Source | None, default: int) -> int:
    found = default if source is None else values.find(source, "window")
    if type(found) is not int or found < 0 or (found == 0 and default):
        raise values.unfit(f"{source.key if source else 'window'} is {found!r}, a positive number was expected")
    return found
