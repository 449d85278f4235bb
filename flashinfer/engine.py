"""Model (weights, slots, plan) and Session (KV cache, position): one step, readable at a glance."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from flashinfer import machine
from flashinfer.backend import Buffer, open_backend
from flashinfer.choice import Choice
from flashinfer.config import Cap, DiskCurve, Rates, RunConfig
from flashinfer.errors import CapExceededError, FlashInferError, PromptError, SessionError, StoreError
from flashinfer.io import Reader, ReaderFactory, open_reader
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, conditions_of
from flashinfer.model.adapter import Adapter
from flashinfer.model.decoder import Decoder
from flashinfer.model.observe import Observer
from flashinfer.model.rows import Rows, decode_row, prefill_rows
from flashinfer.model.streamed import StreamedWeights
from flashinfer.request import UNCAPPED, Settled, check_reader, files_of, settle, threads_for
from flashinfer.speed import Prediction, predict
from flashinfer.store import Facts, Store, open_store
from flashinfer.trace import Trace
from flashinfer.units import format_size

Floats = npt.NDArray[np.float32]
Window = Sequence[Sequence[Sequence[int]]]


class Session:
    """One conversation: its keys and values, and how far it has come."""

    def __init__(self, model: Model, kv: list[Buffer], capacity: int) -> None:
        self._model = weakref.ref(model)
        self._kv = kv
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens. Raises ValueError where there are not as many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a session of {self.length} tokens cannot be cut to {length} tokens")
        self.length = length

    def cache_of(self, model: Model) -> list[Buffer]:
        """Keys and values by layer. Raises FlashInferError where the session is closed, or not one of that model."""
        if self._model() is not model:
            raise FlashInferError("the session belongs to another model; make one with this model's `session`")
        if not self._kv:
            raise FlashInferError("the session is closed; make a new one")
        return self._kv

    def close(self) -> None:
        """Drop the keys and values."""
        self._kv = []


def _open_files(at: Path | str | Store, opened: ReaderFactory) -> tuple[Store, Reader]:
    """The store and its files; once more from the start where it was changed between its manifest and its files."""
    store = at if isinstance(at, Store) else open_store(Path(at))
    try:
        return store, opened(files_of(store))
    except StoreError:
        if isinstance(at, Store) or (again := open_store(Path(at))).manifest == store.manifest:
            raise
        return again, opened(files_of(again))


class Model:
    """An open weight store under a memory cap. Sessions come and go; the cache is shared by them.

    Use `Model.open`. Not thread-safe: one step at a time. A step that fails or is interrupted leaves the model
    and the session as they were before it.
    """

    def __init__(
        self,
        store: Store,
        settled: Settled,
        reader: Reader,
        weights: StreamedWeights,
        decoder: Decoder,
        ledger: Ledger,
    ) -> None:
        self.store, self.plan, self.ledger = store, settled.plan, ledger
        self.facts: Facts = store.manifest.facts
        self.choice: Choice = settled.subject.choice
        self.adapter_id = settled.subject.adapter.identity if settled.subject.adapter is not None else ""
        self._reader, self._weights, self._decoder, self._settled = reader, weights, decoder, settled
        self._closed = False

    @classmethod
    def open(
        cls,
        store: Path | str | Store,
        cap: Cap = UNCAPPED,
        *,
        context: int | None = None,
        run: RunConfig | None = None,
        device: str = "cpu",
        mode: Mode = "cached",
        trace: Trace | None = None,
        reader_of: ReaderFactory | None = None,
    ) -> Model:
        """Open a store, resolve the plan and load what stays resident.

        Without a cap the process may grow to what the machine can spare. What happens from now on is shown in the
        `trace`, which stays the caller's. `reader_of` opens the files, where `run.io` does not say it all.

        Raises:
            StoreError, StoreReadError, CapTooSmallError, DeviceError (the device is not there, or has not the memory),
            PlatformError (`run.io.reader` cannot read here),
            CapTooLargeError (`cap.vram` is more than is free there), PromptError (context beyond the model's),
            PredictorError (the store does not have what `run.predictor` asks for), CheckpointError (`run.adapter`).
        """
        run = run or RunConfig()
        check_reader(run.io.reader, device)
        machine.return_freed_memory()
        store, reader = _open_files(store, reader_of or (lambda paths: open_reader(paths, run.io)))
        try:
            backend = open_backend(device, threads_for(store.manifest, run), run.backend)
        except BaseException:
            reader.close()
            raise
        try:
            settled = settle(store, reader, backend, cap, context=context, run=run, mode=mode)
            manifest, choice, plan = settled.subject.manifest, settled.subject.choice, settled.plan
            if backend.copies is not None and plan.device is not None:
                backend.copies.limit(plan.device.cap)
            geometries = [store.geometry(i) for i in range(manifest.facts.num_layers)]
            ledger, changes = Ledger(trace=trace), settled.subject.adapter
            adapter = Adapter(backend, () if changes is None else changes.changes())
            with ledger.phase(ledger.load, 0):
                weights = StreamedWeights(manifest, geometries, reader, backend, plan, run, mode, choice, ledger)
            decoder = Decoder(
                manifest.facts, weights, plan.context, window=run.cache.window, choice=choice, ledger=ledger,
                adapter=adapter,
            )  # fmt: skip
        except BaseException:
            reader.close()
            backend.close()
            raise
        return cls(store, settled, reader, weights, decoder, ledger)

    def session(self, capacity: int | None = None) -> Session:
        """A new, empty session for up to `capacity` tokens (default, and at most: the plan's context).

        The plan counts one session's memory; who keeps more of them at once answers for theirs.

        Raises:
            PromptError: a capacity below 1. FlashInferError: the model is closed.
        """
        self._check_open()
        if capacity is not None and capacity < 1:
            raise PromptError(f"a session is for at least 1 token, not {capacity}")
        capacity = self.plan.context if capacity is None else min(capacity, self.plan.context)
        return Session(self, self._decoder.new_kv(capacity, self._settled.request.run.kv_type), capacity)

    def save(self, session: Session) -> Iterator[Floats]:
        """The session's keys and values, layer by layer: float32 `[2, length, kv_heads * head_dim]`; the narrower of
        them are filled up with zeros."""
        self._check_open()
        for kv in session.cache_of(self):
            both = self._decoder.backend.fetch_kv(kv, session.length)
            width = max(x.shape[1] for x in both)
            yield np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in both])

    def window(self) -> Window:
        """By layer, the records that each of the last tokens used, oldest first."""
        return [[records.tolist() for records in sets] for sets in self._weights.window()]

    def restore(self, layers: Iterable[Floats], capacity: int, window: Window = ()) -> Session:
        """A session whose keys and values are those that `save` gave: it continues bit for bit the same. What
        `window` gave then is brought back to the slots, as far as they reach now.

        Raises:
            PromptError: they do not fit the capacity. SessionError: they are not those of such a model.
        """
        session = self.session(capacity)
        caches, backend = session.cache_of(self), self._decoder.backend
        keys, values = (self.facts.num_kv_heads * dim for dim in (self.facts.head_dim, self.facts.value_dim))
        restored = 0
        for kv, (k, v) in zip(caches, layers, strict=False):
            if k.shape[1] != max(keys, values):
                break
            if len(k) > session.capacity:
                raise PromptError(f"a session of {len(k)} tokens does not fit the context of {session.capacity}")
            backend.append_kv(kv, 0, backend.place(k[:, :keys]), backend.place(v[:, :values]), 0, len(k))
            session.length, restored = len(k), restored + 1
        if restored != len(caches):
            raise SessionError("the session is not one of this model; start a new one")
        with self.ledger.phase(self.ledger.load, 0):
            self._weights.warm([[np.array(records, dtype=np.int64) for records in sets] for sets in window])
        return session

    def step(self, session: Session, tokens: Sequence[int]) -> Floats:
        """Append tokens to the session; the logits `[vocab]` after the last of them.

        One token is a decode step; more are processed in chunks of the run's `prefill_chunk`.

        Raises:
            PromptError: no tokens, a token outside the vocabulary, or more than the context holds.
            StoreReadError: a read failed; nothing was appended.
            FlashInferError: the model or the session is closed, or the session is another model's.
        """
        last: Floats = self._run(session, tokens, every=False)[-1]
        return last

    def logits(self, session: Session, tokens: Sequence[int]) -> Floats:
        """As `step`, with the logits after every token: `[len(tokens), vocab]`, whose memory is not in the plan."""
        return self._run(session, tokens, every=True)

    def _run(self, session: Session, tokens: Sequence[int], *, every: bool) -> Floats:
        self._check_open()
        kv, ids = session.cache_of(self), self._checked(session, tokens)
        before, out = session.length, []
        account = self.ledger.decode if len(ids) == 1 else self.ledger.prefill
        try:
            with self.ledger.phase(account, len(ids)):
                for rows in self._chunks(before, len(ids)):
                    self._weights.expect_head(every or rows.end == before + len(ids))
                    x = self._decoder.forward(ids[rows.start - before : rows.end - before], rows, kv)
                    session.length = rows.end
                    if every:
                        out.append(self._decoder.head(x)[rows.skip : rows.skip + rows.count])
                if not every:
                    last = self._decoder.backend.take(x, np.array([rows.skip + rows.count - 1]))
                    out.append(self._decoder.head(last))
        except BaseException:
            session.truncate(before)
            raise
        logits: Floats = np.concatenate(out)
        return logits

    def _chunks(self, start: int, count: int) -> list[Rows]:
        if count == 1:
            return [decode_row(start)]
        step = self._settled.request.run.prefill_chunk
        return [prefill_rows(start + i, min(step, count - i)) for i in range(0, count, step)]

    def _check_open(self) -> None:
        if self._closed:
            raise FlashInferError("the model is closed; open it again")

    def _checked(self, session: Session, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise PromptError("there are no tokens to process; give at least one")
        if ids.min() < 0 or ids.max() >= self.facts.vocab_size:
            raise PromptError(f"token ids must lie in 0..{self.facts.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        if session.length + len(ids) > session.capacity:
            raise PromptError(
                f"{session.length + len(ids)} tokens do not fit the context of {session.capacity}; "
                "shorten the prompt or raise --context"
            )
        return ids

    def check_cap(self) -> None:
        """Hold the process's real peak against the promise.

        Raises:
            CapExceededError: the cap is a `--memory` cap and the process grew beyond it.
        """
        peak = machine.peak_resident_bytes()
        if self.plan.cap_kind == "memory" and peak > self.plan.cap:
            raise CapExceededError(
                f"the process grew to {format_size(peak)}, above its cap of {format_size(self.plan.cap)}; "
                "please report this with the output of --json"
            )

    def predict(self, disk: DiskCurve, rates: Rates, *, prompt_tokens: int) -> Prediction:
        """How fast this model should be under its plan, on such a disk and machine."""
        c = conditions_of(self._settled.subject.manifest, self._settled.request, disk, rates)
        return predict(c, self.plan, prompt_tokens=prompt_tokens)

    def observe(self, observer: Observer | None) -> None:
        """Show every layer of every step to the observer from now on; None ends it. Its memory is not in the plan."""
        self._decoder.observer = observer

    @property
    def effective_window(self) -> int:
        """How many of the last tokens have all their neurons in the slots, at most the window asked for."""
        return self._weights.effective_window

    @property
    def reader_note(self) -> str:
        """How the store is read, for people."""
        return self._reader.note

    def close(self) -> None:
        """Release weights, threads and files. Idempotent."""
        self._closed = True
        self._weights.close()
        self._reader.close()
        self._weights.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
