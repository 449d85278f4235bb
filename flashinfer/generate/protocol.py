"""What generating text needs of the engine (`flashinfer.engine.Model`); tests put another in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from flashinfer.choice import Choice
from flashinfer.config import DiskCurve, Rates
from flashinfer.generate.sampler import Floats
from flashinfer.generate.session_file import Window
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.observe import Observer
from flashinfer.speed import Prediction
from flashinfer.store import Facts, Store


class StepEngine(Protocol):
    """What a single generation needs."""

    def session(self, capacity: int) -> Any:
        """A new, empty session for `capacity` tokens; it has `length`, `truncate(n)` and `close()`."""

    def restore(self, layers: Iterable[Floats], capacity: int, window: Window) -> Any:
        """A session with these keys and values, and these records in memory."""

    def step(self, session: Any, tokens: list[int]) -> Floats:
        """Append `tokens` to the session; logits [vocab] after the last of them."""


class Engine(StepEngine, Protocol):
    """What a `TextModel` stands on."""

    @property
    def facts(self) -> Facts:
        """Shape of the model."""

    @property
    def store(self) -> Store:
        """Where the weights come from."""

    @property
    def adapter_id(self) -> str:
        """Identity of the adapter that is applied, empty where there is none."""

    @property
    def plan(self) -> Plan:
        """Where the bytes of the cap go."""

    @property
    def ledger(self) -> Ledger:
        """Where the time went, all generations together."""

    @property
    def choice(self) -> Choice:
        """The predictor in use."""

    @property
    def effective_window(self) -> int:
        """How many of the last tokens have all their neurons in DRAM."""

    @property
    def reader_note(self) -> str:
        """How the store is read, for people."""

    def logits(self, session: Any, tokens: list[int]) -> Floats:
        """Append `tokens` to the session; logits [tokens, vocab]."""

    def save(self, session: Any) -> Iterator[Floats]:
        """The session's keys and values by layer, for `restore`."""

    def window(self) -> Window:
        """The records that the last tokens used, by layer."""

    def predict(self, disk: DiskCurve, rates: Rates, *, prompt_tokens: int) -> Prediction:
        """How fast it should be on such a disk and machine."""

    def observe(self, observer: Observer | None) -> None:
        """Show every layer of every step to the observer."""

    def check_cap(self) -> None:
        """Hold the process's peak memory against the cap. Raises CapExceededError."""

    def close(self) -> None:
        """Release weights and files."""
