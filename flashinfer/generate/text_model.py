"""A loaded model that reads and writes text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashinfer.choice import Choice
from flashinfer.config import DEFAULT_NEW_TOKENS, DiskCurve, Rates, SamplingConfig
from flashinfer.errors import FlashInferError, PromptError, StoreError
from flashinfer.generate.live import LiveSession
from flashinfer.generate.protocol import Engine
from flashinfer.generate.sampler import Floats, Sampler, check_sampling
from flashinfer.generate.session_file import Conversation, load_conversation, save_conversation, store_id
from flashinfer.generate.stop import StopStrings
from flashinfer.generate.stream import Generation, Job, Stream
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.observe import Observer
from flashinfer.speed import Prediction
from flashinfer.text import GenerationDefaults, Tokenizer

DEFAULT_DISK, DEFAULT_RATES = DiskCurve(), Rates()


class TextModel:
    """A model and its tokenizer; a context manager, not thread-safe.

    One generation at a time: beginning one ends an unfinished stream, whose context memory it needs.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
        """Raises StoreError where `defaults` holds a value out of range."""
        try:
            check_sampling(defaults.sampling(temperature=defaults.temperature))
        except ValueError as e:
            raise StoreError(f"generation_config.json: {e}; correct it in the checkpoint, then pack again") from e
        self._engine, self._defaults = engine, defaults
        self._stream: weakref.ref[Stream] | None = None
        self._closed = False
        self.tokenizer = tokenizer

    @property
    def plan(self) -> Plan:
        """Where each byte of the memory cap goes."""
        return self._engine.plan

    @property
    def ledger(self) -> Ledger:
        """Bytes, reads, hits and seconds since the model was loaded."""
        return self._engine.ledger

    @property
    def choice(self) -> Choice:
        """The predictor in use; its `note` names an approximation."""
        return self._engine.choice

    def observe(self, observer: Observer | None) -> None:
        """Show every layer of every step from now on to the observer (`flashinfer.model.observe`); None ends it."""
        self._engine.observe(observer)

    @property
    def effective_window(self) -> int:
        """How many of the last tokens have all their neurons in DRAM; at most the window asked for."""
        return self._engine.effective_window

    @property
    def reader_note(self) -> str:
        """How the store is read (direct or through the page cache, alignment), for people."""
        return self._engine.reader_note

    def predict(
        self, disk: DiskCurve = DEFAULT_DISK, rates: Rates = DEFAULT_RATES, *, prompt_tokens: int
    ) -> Prediction:
        """How fast this model should be under its cap, on such a disk and machine (`flashinfer.speed`)."""
        return self._engine.predict(disk, rates, prompt_tokens=prompt_tokens)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        session: str | Path | None = None,
        context_shift: bool = False,
    ) -> Generation:
        """Generate to the end. Parameters and errors are those of `stream`, which has more."""
        stream = self.stream(
            prompt, max_new_tokens=max_new_tokens, stop=stop, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, session=session,
            context_shift=context_shift,
        )  # fmt: skip
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        session: str | Path | None = None,
        context_shift: bool = False,
        live: LiveSession | None = None,
        end_tokens: Collection[int] = (),
    ) -> Stream:
        """Generate a continuation of `prompt` (text, or token ids) piece by piece.

        session: a file the conversation is kept in. Where it exists, the prompt (which may then be empty) is added
        to that conversation, and without a seed the sampler goes on where it stopped. Written when the stream ends.

        context_shift: when the context is full, go on with its first token and its newest half rather than end; what
        they say is computed anew, bit for bit as in a fresh session of these tokens. The session file holds them.

        live: instead of a file, a session that stays in memory: what `prompt` shares with its beginning is not computed
        again. Its keys and values are the plan's one session, so keep no second one. end_tokens: ids that end the text
        beside those that always do.

        What is None comes from the checkpoint's generation_config.json: greedy unless that says
        `do_sample`; naming temperature, top_k, top_p or min_p asks for sampling.

        Raises:
            PromptError: the prompt is empty or leaves no room in the context. At once, as the next two:
            SessionError: the session file is damaged, or of another store.
            ValueError: a parameter is out of its range, or both `session` and `live` are given.
            FlashInferError: the model is closed; while reading: what the engine raises.
        """
        sampling = self._defaults.sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        if session is not None and live is not None:
            raise ValueError("session and live exclude each other: a conversation is kept in one place")
        past = self._conversation(session)
        tokens = self._prompt_tokens(prompt) if past is None else self._continued(past, prompt)
        seen = past.length if past is not None and context_shift else 0
        self._check_room(len(tokens) - seen + (seen > 0))
        job = self._job(tokens, max_new_tokens, stop, sampling, context_shift)
        job = replace(job, live=live, eos_ids=job.eos_ids.union(end_tokens))
        if session is not None:
            if past is not None and seed is None:
                job.sampler.state = past.random
            job = replace(job, resume=past, keep=self._keeper(Path(session), job.sampler))
        self._end_stream()
        stream = Stream(self._engine, self.tokenizer, job)
        self._stream = weakref.ref(stream)
        return stream

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """Logits after each of `token_ids`: float32 [tokens, vocab].

        Raises:
            PromptError: there are none, more than the context holds, or one outside the vocabulary.
        """
        tokens = self._checked(token_ids)
        if len(tokens) > self.plan.context:
            raise PromptError(f"{len(tokens)} tokens are more than the context of {self.plan.context}")
        self._end_stream()
        session = self._engine.session(len(tokens))
        try:
            return self._engine.logits(session, list(tokens))
        finally:
            session.close()

    def check_cap(self) -> None:
        """Hold this process's real peak memory against a `memory` cap.

        Raises:
            CapExceededError: it grew beyond the cap (through us, or through what else the process did).
        """
        self._engine.check_cap()

    def close(self) -> None:
        """Release weights and files. Idempotent."""
        if not self._closed:
            self._end_stream()
            self._closed = True
            self._engine.close()

    def __enter__(self) -> TextModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _job(
        self, prompt: tuple[int, ...], new: int, stop: Sequence[str], sampling: SamplingConfig, shift: bool
    ) -> Job:
        if new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {new}")
        StopStrings(stop)
        eos = frozenset(self._defaults.eos_ids or self.tokenizer.eos_ids)
        return Job(prompt, new, self.plan.context, shift, eos, tuple(stop), Sampler(sampling))

    def _conversation(self, session: str | Path | None) -> Conversation | None:
        if session is None or not Path(session).exists():
            return None
        return load_conversation(Path(session), store_id(self._engine.store.manifest, self._engine.adapter_id))

    def _continued(self, past: Conversation, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The conversation's tokens, with the prompt's at the end."""
        more = self.tokenizer.encode(prompt, add_bos=False) if isinstance(prompt, str) else prompt
        return self._checked((*past.tokens, *more))

    def _keeper(self, path: Path, sampler: Sampler) -> Callable[[Any, tuple[int, ...]], None]:
        def keep(session: Any, tokens: tuple[int, ...]) -> None:
            store = store_id(self._engine.store.manifest, self._engine.adapter_id)
            save_conversation(path, store, tokens, sampler.state, self._engine.window(), self._engine.save(session))

        return keep

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return self._checked(prompt)
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as e:
            raise PromptError(f"the prompt is not valid Unicode text ({e.reason} at {e.start})") from e
        if not self.tokenizer.encode(prompt, add_bos=False):
            raise PromptError("the prompt is empty; give at least one word to continue")
        return self._checked(self.tokenizer.encode(prompt))

    def _checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if self._closed:
            raise FlashInferError("the model is closed; load it again")
        if len(tokens) == 0:
            raise PromptError("the prompt has no tokens; give at least one")
        vocab = self._engine.facts.vocab_size
        outside = [t for t in tokens if not 0 <= t < vocab]
        if outside:
            raise PromptError(f"token id {outside[0]} lies outside the model's vocabulary of {vocab} tokens")
        return tuple(map(int, tokens))

    def _check_room(self, tokens: int) -> None:
        """Raise PromptError where so many tokens, which no shift may drop, leave no room for another."""
        context, longest = self.plan.context, self._engine.facts.context_length
        if tokens < context:
            return
        advice = f" or raise the context (up to {longest})" if context < longest else ""
        raise PromptError(
            f"the prompt has {tokens} tokens; with one to generate that exceeds the context of {context}: "
            f"shorten the prompt{advice}"
        )

    def _end_stream(self) -> None:
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.supersede()
        self._stream = None
