"""The rotary facts of one model, from what a layout says and the scaling table of config.json. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from flashinfer.layout.schema import RopeSource, RotatedLayers, Source
from flashinfer.layout.values import Values, layer_count
from flashinfer.layout.window import FULL, SLIDING
from flashinfer.store.facts import Rope

_ALIASES = {"su": "longrope"}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
"""What each type's table may say beside what all may."""
_ORIGINAL = "original_max_position_embeddings"


def read_rope(values: Values, source: RopeSource) -> dict[str, Any]:
    """Rotary positions as transformers reads them from this config.json: the facts `rope` and `local_rope`, and
    `attention_scale` where the table says it.

    `dynamic` scaling changes nothing within `max_position_embeddings`, and no run goes beyond that: it is none here.
    Raises LayoutError for a type, or a key of its table, that is not known.
    """
    table: Any = next((values.config[key] for key in source.parameters if values.config.get(key)), {})
    if source.local_theta is None:
        scale = _attention_scale(values, table) if source.mscale else {}
        return {"rope": _rope(values, source, source.theta, table)} | scale
    by_kind = isinstance(table, dict) and bool(set(table) & {FULL, SLIDING})
    tables = table if by_kind else {FULL: table}
    return {
        "rope": _rope(values, source, source.theta, tables.get(FULL) or {}),
        "local_rope": _rope(values, source, source.local_theta, tables.get(SLIDING) or {}),
    }


def _rope(values: Values, source: RopeSource, theta: Source, table: Any) -> Rope:
    """One of them, from its table."""
    if not isinstance(table, dict):
        raise values.unfit(f"rope parameters {str(table)[:120]} are not understood")
    table = {key: value for key, value in table.items() if value is not None}
    kind = str(table.get("rope_type", table.get("type", "default")))
    kind = _ALIASES.get(kind, kind)
    if set(table) & {FULL, SLIDING}:
        raise values.unfit(f"rope parameters {str(table)[:120]} are not understood: they differ by layer")
    if kind not in _KEYS:
        raise values.unfit(f"rope type {kind[:40]!r}; {', '.join(_KEYS)} are supported")
    if unknown := sorted(set(table) - _COMMON - _KEYS[kind] - {_ORIGINAL}):
        raise values.unfit(f"rope parameters of type {kind} with {', '.join(unknown)[:80]} are not understood")
    fields: dict[str, Any] = {
        "theta": table.get("rope_theta") or values.find(theta, "rope theta"),
        "rotary_dim": _rotary_dim(values, source, table),
        "skipped": () if source.layers is None else _skipped(values, source.layers),
        "reversed": source.reversed,
    }
    try:
        return msgspec.convert(fields | _scaling(values, kind, table), Rope)
    except msgspec.ValidationError as e:
        raise values.unfit(f"rope parameters: {e}") from e
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise values.unfit(f"rope parameters {str(table)[:120]} are not understood: {e}") from e


def _rotary_dim(values: Values, source: RopeSource, table: Mapping[str, Any]) -> Any:
    turned = source.rotary_dim
    whole = values.size(turned) if isinstance(turned, str) else values.find(turned, "rotary_dim")
    share = table.get("partial_rotary_factor")
    if source.partial is not None and share is None:
        share = values.find(source.partial, "partial_rotary_factor")
    share = 1.0 if share is None else share
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise values.unfit(f"partial_rotary_factor {share!r} is not supported: a number from 0 to 1 was expected")
    if source.partial is None and share != 1.0:
        raise values.unfit(f"partial_rotary_factor {share} is not supported in this family")
    return int(whole * share)


def _skipped(values: Values, layers: RotatedLayers) -> tuple[int, ...]:
    count, flags = layer_count(values), values.config.get(layers.flags)
    if flags is None:
        interval = values.find(layers.interval, layers.flags)
        if type(interval) is not int or interval < 1:
            raise values.unfit(f"{layers.interval.key} is {interval!r}, a positive number was expected")
        flags = [(i + 1) % interval for i in range(count)]
    if not isinstance(flags, list) or len(flags) != count:
        raise values.unfit(f"{layers.flags} is not a list of {count} flags, one for each layer")
    return tuple(i for i, flag in enumerate(flags) if not flag)


def _scaling(values: Values, kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a scaling, with the defaults transformers has for what the table leaves out."""
    if kind in ("default", "dynamic"):
        return {}
    fields = {"scaling": kind} | {k: table[k] for k in _KEYS[kind] - {"mscale", "mscale_all_dim"} if k in table}
    if kind == "linear":
        return {"factor": None} | fields
    context = values.value("context_length")
    original = table.get(_ORIGINAL) or values.config.get(_ORIGINAL) or context
    fields["original_context"] = original
    if kind == "llama3":
        return {"factor": None, "low_freq_factor": None, "high_freq_factor": None} | fields
    fields.setdefault("factor", context / original)
    if "attention_factor" not in fields:
        attention = _yarn_attention if kind == "yarn" else _longrope_attention
        fields["attention_factor"] = attention(fields["factor"], original, table)
    return fields


def _mscale(factor: float, weight: float) -> float:
    """By how much YaRN stretches queries and keys (arXiv 2309.00071, section 3.4), as DeepSeek weighs it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention(factor: float, original: int, table: Mapping[str, Any]) -> float:
    """With two `mscale` the quotient DeepSeek made of it."""
    if table.get("mscale") and table.get("mscale_all_dim"):
        return _mscale(factor, table["mscale"]) / _mscale(factor, table["mscale_all_dim"])
    return _mscale(factor, 1.0)


def _attention_scale(values: Values, table: Any) -> dict[str, float]:
    """Where the table has `mscale_all_dim`, which stretches both factors of a product; a table that is none is told
    later."""
    weight, factor = (table.get(key) if isinstance(table, dict) else None for key in ("mscale_all_dim", "factor"))
    if not weight:
        return {}
    if not isinstance(weight, int | float) or not isinstance(factor, int | float):
        raise values.unfit(f"rope parameters {str(table)[:120]} are not understood: numbers were expected")
    return {"attention_scale": values.value("head_dim") ** -0.5 * _mscale(factor, weight) ** 2}


def _longrope_attention(factor: float, original: int, table: Mapping[str, Any]) -> float:
    """arXiv 2402.13753, as Phi-3 does it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
