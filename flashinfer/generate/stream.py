"""One generation: the loop from prompt to last token, as a stream of text pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from flashinfer.errors import FlashInferError
from flashinfer.generate.live import LiveSession
from flashinfer.generate.protocol import StepEngine
from flashinfer.generate.sampler import Sampler
from flashinfer.generate.session_file import Conversation
from flashinfer.generate.stop import StopStrings
from flashinfer.text import Detokenizer, Tokenizer

FinishReason = Literal["stop", "eos", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Seconds the model worked; time spent by who reads the stream is not in it.

    first_token: from the start to the first token, that is, the prompt.
    decode: all tokens after the first.
    """

    first_token: float
    decode: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Generation:
    """The result. `tokens` are the generated ids (with the EOS, if it came), `prompt_tokens` those before.

    finish_reason: `stop` (a stop string), `eos`, `length` (as many tokens as asked), `context` (no room
    for more) or `cancelled` (the stream was not read to its end). context_shifts: how often the context was full
    and the text in it was shortened.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    context_shifts: int = 0


@dataclass(frozen=True)
class Job:
    """What is to be generated, in a context of so many tokens. `shift`: when it is full, go on with a shortened text.

    resume: the conversation that `prompt` begins with, whose keys and values are there already. keep: called with the
    session and the tokens it stands for when the stream ends, however it ends. live: instead of both, a session that
    outlives the stream, of which the prompt takes over what it shares with it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    context: int
    shift: bool
    eos_ids: frozenset[int]
    stops: tuple[str, ...]
    sampler: Sampler
    resume: Conversation | None = None
    keep: Callable[[Any, tuple[int, ...]], None] | None = None
    live: LiveSession | None = None


@dataclass
class _Record:
    """What has been generated so far; shared by a stream and its loop.

    known: the tokens the session stands for, the newest of which it may not have seen. They are the prompt and what
    was generated, until the context is shifted.
    """

    known: list[int]
    shifts: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    first_token: float = 0.0
    decode: float = 0.0


class Stream(Iterator[str]):
    """Text pieces, each as soon as it is certain. Stop reading at any time; the model stays usable.

    `result` says what has been generated so far.
    """

    def __init__(self, engine: StepEngine, tokenizer: Tokenizer, job: Job) -> None:
        self._job, self._record = job, _Record(list(job.prompt))
        self._pieces = _pieces(engine, tokenizer, job, self._record)
        self._superseded = False

    def __next__(self) -> str:
        """The next piece.

        Raises:
            FlashInferError: the model was closed or has begun another generation in the meantime.
        """
        if self._superseded and self._record.finish_reason is None:
            raise FlashInferError("this stream is over: its model was closed or began another generation")
        return next(self._pieces)

    def close(self) -> None:
        """Give up what is not generated yet, and the session. Idempotent."""
        self._pieces.close()

    def supersede(self) -> None:
        """`close`, and make reading on an error rather than an end."""
        self._superseded = True
        self.close()

    @property
    def result(self) -> Generation:
        """What has been generated so far; `cancelled` unless the stream was read to its end."""
        r = self._record
        further = max(0, len(r.tokens) - 1)
        rate = further / r.decode if r.decode else 0.0
        timings = Timings(r.first_token, r.decode, rate)
        reason = r.finish_reason or "cancelled"
        return Generation(r.text, tuple(r.tokens), self._job.prompt, reason, timings, r.shifts)


def _pieces(engine: StepEngine, tokenizer: Tokenizer, job: Job, record: _Record) -> Generator[str, None, None]:
    """The loop. Not a method of `Stream`, so that a stream nobody holds any more is closed at once."""
    text, stops = Detokenizer(tokenizer, after=job.prompt), StopStrings(job.stops)
    session = _session(engine, job, record)
    try:
        while record.finish_reason is None:
            token = _next_token(engine, session, job, record)
            piece = "" if token in job.eos_ids else stops.push(text.push(token))
            reason = _finish(token, stops, job, len(record.tokens))
            if reason is not None:
                piece += stops.push(text.flush()) + stops.flush()
            record.text += piece
            record.finish_reason = reason
            if piece:
                yield piece
    finally:
        if job.keep is not None and (session.length or record.shifts):
            job.keep(session, tuple(record.known))
        if job.live is None:
            session.close()
        else:
            job.live.tokens = record.known[: session.length]


def _session(engine: StepEngine, job: Job, record: _Record) -> Any:
    """A session that has seen what the resumed conversation's had, as far as that still fits the context."""
    if job.live is not None:
        return job.live.begin(engine, job.context, job.prompt)
    capacity = min(len(job.prompt) + job.max_new_tokens, job.context)
    if job.resume is None or len(job.prompt) > capacity:
        if len(job.prompt) > capacity:
            _shorten(record, capacity, len(job.prompt) - (job.resume.length if job.resume else 0))
        return engine.session(capacity)
    session = engine.restore(job.resume.layers(), capacity, job.resume.window)
    if session.length == len(job.prompt):  # it was stopped before a token was drawn: take the last step again
        session.truncate(session.length - 1)
    return session


def _shorten(record: _Record, context: int, unseen: int) -> None:
    """Keep the first token (BOS, as a rule) and the newest half of the context, with all that is unseen yet."""
    record.known = [record.known[0], *record.known[-max(context // 2, unseen) :]]
    record.shifts += 1


def _next_token(engine: StepEngine, session: Any, job: Job, record: _Record) -> int:
    """Draw a token after what is known. A full context is shortened first, and then seen anew from its start: the
    session is that of the shortened text, in every bit."""
    started = time.perf_counter()
    if len(record.known) > session.capacity:
        unseen = len(record.known) - session.length
        session.truncate(0)
        _shorten(record, session.capacity, unseen)
    logits = engine.step(session, record.known[session.length :])
    token = job.sampler.sample(logits, record.known)
    seconds = time.perf_counter() - started
    if record.tokens:
        record.decode += seconds
    else:
        record.first_token = seconds
    record.tokens.append(token)
    record.known.append(token)
    return token


def _finish(token: int, stops: StopStrings, job: Job, generated: int) -> FinishReason | None:
    """Why `token` is the last one, or None."""
    if token in job.eos_ids:
        return "eos"
    if stops.stopped:
        return "stop"
    if generated >= job.max_new_tokens:
        return "length"
    return "context" if not job.shift and len(job.prompt) + generated >= job.context else None
