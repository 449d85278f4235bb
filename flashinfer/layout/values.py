"""What a table of a layout is read from: the facts that are known, and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flashinfer.errors import LayoutError
from flashinfer.layout.schema import Source

_MOST_LAYERS = 1 << 16
"""Far more than any model has: a list is made of them before the tensors can contradict."""


class Values(Protocol):
    """The part of `resolve.Resolver` that is needed here."""

    config: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """Value of a fact."""
        ...

    def size(self, text: str) -> int:
        """Value of an expression over facts."""
        ...

    def holds(self, when: tuple[str, ...]) -> bool:
        """Whether all conditions hold."""
        ...

    def find(self, source: Source, name: str) -> Any:
        """The value a source gives."""
        ...

    def unfit(self, what: str) -> LayoutError:
        """The error of a config.json that cannot be followed."""
        ...


def layer_count(values: Values) -> int:
    """How many layers config.json says. Raises LayoutError where that is absurd."""
    count = values.value("num_layers")
    if type(count) is not int or count > _MOST_LAYERS:
        raise values.unfit(f"it says {str(count)[:40]} layers")
    return count
