"""A session that stays in memory between generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flashinfer.generate.protocol import StepEngine


@dataclass
class LiveSession:
    """Keys and values that outlive a generation; mutable, of one model.

    tokens: what the session stands for, as the last generation left it. reused: how many tokens of the last prompt
    were not computed again.
    """

    session: Any = None
    tokens: list[int] = field(default_factory=list)
    reused: int = 0

    def begin(self, engine: StepEngine, capacity: int, prompt: Sequence[int]) -> Any:
        """The session, cut to the beginning it shares with `prompt`; one token at least is left to compute.

        Until who generates sets `tokens` again, the session stands for nothing that is known.
        """
        if self.session is None:
            self.session = engine.session(capacity)
        self.reused = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        self.tokens = []
        self.session.truncate(self.reused)
        return self.session

    def close(self) -> None:
        """Drop the keys and values; the next generation begins with none. Idempotent."""
        if self.session is not None:
            self.session.close()
        self.session, self.tokens = None, []


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
