"""Which codec each matrix is packed in: what `--quant` says, by role. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from flashinfer.quant import PLAIN, user_codec
from flashinfer.store.facts import Facts

CLASSES: Final = {
    "embed": "the embedding, and learned positions where the codec is f32, f16 or bf16",
    "head": "the matrix whose product is the logits; of a model that ties it to the embedding, that",
    "attn": "q, k, v and o, and projections between embedding and layers",
    "ffn": "gate, up and down",
    "router": "of a mixture of experts: what chooses them, and weighs shared ones; the biases of their outputs",
    "decision": "of gate and up the one whose product decides who fires; as ffn where nothing is said",
}
"""What can be named, and what belongs to it."""
_PLAIN: Final = frozenset(c.name for c in PLAIN)
_TABLES: Final = "int8"
"""Embedding and head beside a quantised codec: their errors reach every token, and they are small beside the rest."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for: (class or pattern of roles, codec), the later over the earlier. What nothing fits is packed
    in the type it has."""

    rules: tuple[tuple[str, str], ...] = ()

    def codec(self, role: str, facts: Facts) -> str | None:
        """The codec of a matrix of that role; None: as it is."""
        found = None
        for name, codec in self.rules:
            if name in _classes_of(role, facts) if name in CLASSES else fnmatchcase(role, name):
                found = codec
        return None if role == "embed.positions" and found not in _PLAIN else found

    def unused(self, roles: list[str], facts: Facts) -> list[str]:
        """Names that fit no matrix of a model with these roles."""
        return [
            name
            for name, _ in self.rules
            if not any(name in _classes_of(r, facts) if name in CLASSES else fnmatchcase(r, name) for r in roles)
        ]


def parse_recipe(text: str | None, more: Sequence[str] = ()) -> Recipe:
    """`nf4`, or `ffn=nf4,attn=int8,head=f16`, or both: a codec for all, then exceptions. Names on the left are classes,
    or patterns of roles (`layers.0.*=f16`; `flashinfer inspect` lists roles).

    A quantised codec for all means: attention and feed-forward in it, embedding and head in int8. Vectors are f32, and
    routers as they are.

    more: names of codecs that are known beside those of `quant.CODECS`.

    Raises:
        ValueError: an unknown codec, or something that is neither a codec nor NAME=CODEC; says what there is.
    """
    rules: list[tuple[str, str]] = []
    for part in (text or "").split(",") if text is not None else ():
        name, equals, codec = (word.strip() for word in part.partition("="))
        if not equals:
            if rules:
                raise ValueError(f"{part.strip()!r} comes after other names; one codec for all comes first")
            rules += _for_all(_codec(name, more))
        elif name in CLASSES or "." in name:
            rules.append((name, _codec(codec, more)))
        else:
            raise ValueError(f"{name!r} is no kind of matrix; there are {', '.join(CLASSES)}, and patterns of roles")
    return Recipe(tuple(rules))


def _codec(name: str, more: Sequence[str]) -> str:
    return name if name in more else user_codec(name).name


def _for_all(codec: str) -> list[tuple[str, str]]:
    tables = codec if codec in _PLAIN else _TABLES
    named = [name for name in CLASSES if name not in ("router", "decision")]
    return [(name, tables if name in ("embed", "head") else codec) for name in named]


def _classes_of(role: str, facts: Facts) -> tuple[str, ...]:
    """The classes a matrix of that role is in."""
    if role == "embed.weight":
        return ("embed", "head") if facts.tied_head else ("embed",)
    if any(f".ffn.{name}." in role for name in ("router", "shared_gate", "expert_bias")):
        return ("router",)
    if ".ffn." in role:
        return ("ffn", "decision") if role.endswith(f".ffn.{facts.decision}.weight") else ("ffn",)
    return {"embed.positions": ("embed",), "head.weight": ("head",)}.get(role, ("attn",))
