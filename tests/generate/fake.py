"""A model that is a table: the next token depends on the last one only. And a tokenizer of single characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt

from flashinfer.choice import Choice
from flashinfer.config import DiskCurve, KvType, Rates
from flashinfer.errors import CapExceededError
from flashinfer.firing import Firing
from flashinfer.generate import TextModel
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.observe import Observer
from flashinfer.speed import Prediction
from flashinfer.store import Facts
from flashinfer.text import GenerationDefaults, Tokenizer

BOS, EOS, FIRST = 1, 2, 3
ALPHABET = "abcdefghijklmnopqrstuvwxyz .\u4f60"


class LetterTokenizer(Tokenizer):
    """One token per character of ALPHABET; the last one, of three bytes, is three tokens."""

    vocab_size = FIRST + len(ALPHABET) - 1 + 3
    base_size = vocab_size
    bos_id = BOS
    eos_ids = (EOS,)
    specials: ClassVar[dict[str, int]] = {}
    strips_leading_space = False

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        bytes_ = list(range(self.vocab_size - 3, self.vocab_size))
        ids = [bytes_ if c == ALPHABET[-1] else [FIRST + ALPHABET.index(c)] for c in text]
        return [BOS] * add_bos + [i for group in ids for i in group]

    def token_bytes(self, token: int) -> bytes:
        data = [b"", b"", b"", *(c.encode() for c in ALPHABET[:-1])]
        data += [bytes([b]) for b in ALPHABET[-1].encode()]
        return data[token] if 0 <= token < len(data) else b""


@dataclass
class FakeSession:
    engine: FakeEngine
    capacity: int
    length: int = 0
    closed: bool = False

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.engine.open_sessions -= 1


class FakeEngine:
    """After the prompt it says `script`, token by token; then it says `script` again."""

    def __init__(self, script: str | Sequence[int], context: int = 64) -> None:
        self.script = LetterTokenizer().encode(script, add_bos=False) if isinstance(script, str) else list(script)
        self.facts = cast(Facts, _Facts(LetterTokenizer.vocab_size, 128))
        self.plan = cast(Plan, _Plan(context))
        self.ledger, self.effective_window, self.reader_note = Ledger(), 5, "fake"
        self.open_sessions = self.steps = self.closes = 0
        self.over_cap, self.choice, self.adapter_id = False, Choice(), ""
        self.observer: Observer | None = None
        self.asked: list[list[int]] = []

    def session(self, capacity: int) -> FakeSession:
        self.open_sessions += 1
        return FakeSession(self, capacity)

    def step(self, session: FakeSession, tokens: list[int]) -> npt.NDArray[np.float32]:
        assert not session.closed
        assert session.length + len(tokens) <= session.capacity
        if session.length == 0:
            self.steps = 0
        session.length += len(tokens)
        self.asked.append(list(tokens))
        logits = np.zeros(self.facts.vocab_size, dtype=np.float32)
        logits[self.script[self.steps % len(self.script)]] = 4
        self.steps += 1
        return logits

    def logits(self, session: FakeSession, tokens: list[int]) -> npt.NDArray[np.float32]:
        return np.stack([self.step(session, [t]) for t in tokens])

    def predict(self, disk: DiskCurve, rates: Rates, *, prompt_tokens: int) -> Prediction:
        return Prediction(1e6, 9.0, 2e6, 0.1, 0.1, 0.2, 0.25, 0.1, 1.0, 1.5, prompt_tokens, "disk", Firing())

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def check_cap(self) -> None:
        if self.over_cap:
            raise CapExceededError("grew beyond the cap")

    def close(self) -> None:
        assert self.open_sessions == 0
        self.closes += 1


@dataclass
class _Facts:
    vocab_size: int
    context_length: int


@dataclass
class _Plan:
    context: int
    kv_type: KvType = "f32"
    cap: int = 1 << 30
    cap_kind: str = "memory"
    weight_adapter: int = 0
    device: None = None

    def to_json(self) -> dict[str, int]:
        return {"context": self.context}


def fake_model(
    script: str | Sequence[int], *, context: int = 64, defaults: GenerationDefaults | None = None
) -> tuple[TextModel, FakeEngine]:
    """A TextModel over a FakeEngine, and the engine."""
    engine = FakeEngine(script, context)
    return TextModel(engine, LetterTokenizer(), defaults or GenerationDefaults()), engine
