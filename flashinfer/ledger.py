"""The ledger: where every byte and every millisecond of a run went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from flashinfer.machine import device_bytes_read
from flashinfer.trace import Trace

PHASES: Final = ("load", "prefill", "decode")
NOTHING: Final = nullcontext()


@dataclass
class Account:
    """Sums over the steps of one phase. Bytes are bytes asked of the device; times are seconds.

    device_bytes: what the kernel says it fetched from storage for this process meanwhile, its page-ins of program and
    libraries among it; None where it does not say.
    useful_bytes: of the bytes read, those of records somebody needed and of streamed dense matrices.
    planning: deciding what stays in the slots and what is read; copying: records to their slots, and the host's part in
    copies to a device; submitting: handing reads to the kernel. Together they are `management`.
    hits, misses: records found in a slot, records that had to be read. guessed_bytes: of the bytes read, those read
    before anybody needed them; guessed_useful: of these, those of records that then were needed.
    copied_bytes: weights copied to a device that has its own memory; copied_back_bytes: records that left its slots for
    the host's; copies: the transfers both took. bytes_to_device: of the bytes read, those read straight to its
    memory. They cross the same bus, and are not among the bytes copied.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    io_wait: float = 0.0
    planning: float = 0.0
    copying: float = 0.0
    submitting: float = 0.0
    bytes_read: int = 0
    device_bytes: int | None = 0
    reads: int = 0
    useful_bytes: int = 0
    hits: int = 0
    misses: int = 0
    guessed_bytes: int = 0
    guessed_useful: int = 0
    copied_bytes: int = 0
    copied_back_bytes: int = 0
    copies: int = 0
    bytes_to_device: int = 0

    @property
    def management(self) -> float:
        """Seconds that went to cache and I/O but not to waiting: planning, copying and submitting."""
        return self.planning + self.copying + self.submitting

    @property
    def management_share(self) -> float:
        """Management in parts of all seconds; 0 before the first step."""
        return self.management / self.seconds if self.seconds else 0.0

    @property
    def compute(self) -> float:
        """Seconds that went neither to waiting for reads nor to management."""
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
    def copied_per_token(self) -> float:
        """Bytes copied to a device per token."""
        return self.copied_bytes / max(1, self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the phase; 0 before its first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def fetched(self, before: int | None, after: int | None) -> None:
        """Charge what the kernel fetched between these two counts of it."""
        if before is None or after is None:
            self.device_bytes = None
        elif self.device_bytes is not None:
            self.device_bytes += after - before

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain values."""
        derived = (
            "management",
            "management_share",
            "compute",
            "hit_rate",
            "bytes_per_token",
            "copied_per_token",
            "tokens_per_second",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass
class Ledger:
    """One account per phase: loading, prompt processing, token by token decoding.

    All timing is done here, once: what is charged to an account is the very span a `trace` shows.
    """

    load: Account = field(default_factory=Account)
    prefill: Account = field(default_factory=Account)
    decode: Account = field(default_factory=Account)
    current: Account = field(default_factory=Account)
    """The account that is being written to."""
    trace: Trace | None = None

    @contextmanager
    def phase(self, account: Account, tokens: int) -> Iterator[None]:
        """Charge what happens inside to `account`. What fails costs time and bytes, but no token came of it."""
        self.current = account
        name = next(name for name in PHASES if getattr(self, name) is account)
        before = device_bytes_read()
        try:
            with self._timing(name, "seconds", tokens=tokens):
                yield
                account.steps += 1
                account.tokens += tokens
        finally:
            account.fetched(before, device_bytes_read())

    def planning(self) -> AbstractContextManager[None]:
        """Charge the time inside to planning: the cache policy, plans of reads, tables of places."""
        return self._timing("cache", "planning")

    def copying(self) -> AbstractContextManager[None]:
        """Charge the time inside to copying records to their slots, or to a device."""
        return self._timing("copy records", "copying")

    def submitting(self, name: str) -> AbstractContextManager[None]:
        """Charge the time inside to handing reads to the kernel (see `submitted`)."""
        return self._timing("submit reads", "submitting", reads=name)

    def waiting(self, name: str, batch: int) -> AbstractContextManager[None]:
        """Charge the time inside to waiting for that batch of reads (see `submitted`)."""
        return self._timing("wait for reads", "io_wait", reads=name, batch=batch)

    def span(self, name: str, layer: int | None = None) -> AbstractContextManager[None]:
        """Show the time inside in the trace, if there is one. Nothing is charged: what no account names is compute."""
        if self.trace is None:
            return NOTHING
        return self._timing(name, None, **({} if layer is None else {"layer": layer}))

    def submitted(self, name: str, size: int, reads: int, useful: int, *, to_device: bool = False) -> int:
        """Charge a batch of reads that is on its way; returns its number in the trace."""
        account = self.current
        account.bytes_read += size
        account.reads += reads
        account.useful_bytes += useful
        account.bytes_to_device += size if to_device else 0
        return 0 if self.trace is None else self.trace.reads_submitted(name, size, reads)

    def copied(self, size: int, transfers: int, *, back: bool = False) -> None:
        """Charge copies to a device, or back from it, that are on their way."""
        if back:
            self.current.copied_back_bytes += size
        else:
            self.current.copied_bytes += size
        self.current.copies += transfers

    def seen(self, name: str, batch: int) -> None:
        """The batch of that number has ended."""
        if self.trace is not None:
            self.trace.reads_seen(name, batch)

    @contextmanager
    def _timing(self, name: str, charge: str | None, **args: int | str) -> Iterator[None]:
        """Charge the time inside to that field of the current account, and show it in the trace."""
        account, started = self.current, time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            if charge is not None:
                setattr(account, charge, getattr(account, charge) + ended - started)
            if self.trace is not None:
                self.trace.span(name, started, ended, args)

    def to_json(self) -> dict[str, Any]:
        """The three accounts."""
        return {name: getattr(self, name).to_json() for name in PHASES}
