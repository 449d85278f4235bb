"""The ledger: where every byte and every millisecond of a run went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Account:
    """Sums over the steps of one phase. Bytes are bytes asked of the device; times are seconds.

    useful_bytes: of the bytes read, those of records somebody needed and of streamed dense matrices.
    hits, misses: records found in a slot, records that had to be read.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    io_wait: float = 0.0
    management: float = 0.0
    bytes_read: int = 0
    reads: int = 0
    useful_bytes: int = 0
    hits: int = 0
    misses: int = 0

    @property
    def compute(self) -> float:
        """Seconds that went neither to waiting for reads nor to planning and cache bookkeeping."""
        return max(0.0, self.seconds - self.io_wait - self.management)

    @property
    def hit_rate(self) -> float:
        """Share of needed records found in a slot; 0 where none was needed."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token."""
        return self.bytes_read / max(1, self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the phase; 0 before its first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain values."""
        derived = ("compute", "hit_rate", "bytes_per_token", "tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass
class Ledger:
    """One account per phase: loading, prompt processing, token by token decoding."""

    load: Account = field(default_factory=Account)
    prefill: Account = field(default_factory=Account)
    decode: Account = field(default_factory=Account)
    current: Account = field(default_factory=Account)
    """The account that is being written to."""

    @contextmanager
    def phase(self, account: Account, tokens: int) -> Iterator[None]:
        """Charge what happens inside to `account`. What fails costs time and bytes, but no token came of it."""
        self.current, started = account, time.perf_counter()
        try:
            yield
            account.steps += 1
            account.tokens += tokens
        finally:
            account.seconds += time.perf_counter() - started

    @contextmanager
    def managing(self) -> Iterator[None]:
        """Charge the time inside to cache management."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.current.management += time.perf_counter() - started

    def to_json(self) -> dict[str, Any]:
        """The three accounts."""
        return {name: getattr(self, name).to_json() for name in ("load", "prefill", "decode")}
