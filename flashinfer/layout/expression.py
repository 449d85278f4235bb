"""Sizes as a layout writes them: sums, products and exact quotients of facts and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[*/+-])")


@dataclass(frozen=True)
class Expression:
    """A parsed size: signed products, each a list of (operator, fact or number)."""

    text: str
    products: tuple[tuple[int, tuple[tuple[str, str | int], ...]], ...]

    @property
    def names(self) -> frozenset[str]:
        """The facts it needs."""
        return frozenset(a for _, factors in self.products for _, a in factors if isinstance(a, str))

    def evaluate(self, fact: Callable[[str], int]) -> int:
        """Its value; `fact` gives that of a name. Raises ValueError where a quotient is not exact."""
        total = 0
        for sign, factors in self.products:
            value = 1
            for operator, atom in factors:
                number = fact(atom) if isinstance(atom, str) else atom
                if operator == "/" and (number == 0 or value % number):
                    raise ValueError(f"{self.text}: {value} is not a multiple of {number}")
                value = value // number if operator == "/" else value * number
            total += sign * value
        return total


def parse_expression(text: str) -> Expression:
    """Parse e.g. `hidden_size / num_heads` or `context_length + position_offset`. Raises ValueError."""
    tokens = _tokens(text)
    if len(tokens) % 2 == 0:
        raise ValueError(f"{text!r} is not a size: names and numbers joined by + - * /")
    products: list[tuple[int, list[tuple[str, str | int]]]] = []
    for operator, atom in zip(["+", *tokens[1::2]], tokens[::2], strict=True):
        if operator not in "+-*/" or atom in "+-*/":
            raise ValueError(f"{text!r} is not a size: names and numbers joined by + - * /")
        factor = int(atom) if atom.isdigit() else atom
        if operator in "+-":
            products.append((1 if operator == "+" else -1, [("*", factor)]))
        else:
            products[-1][1].append((operator, factor))
    return Expression(text, tuple((sign, tuple(factors)) for sign, factors in products))


def _tokens(text: str) -> list[str]:
    tokens, end = [], 0
    text = text.rstrip()
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None:
            raise ValueError(f"{text!r} is not a size: {text[end:]!r} is not understood")
        tokens.append(match[1])
        end = match.end()
    return tokens
