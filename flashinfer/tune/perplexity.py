"""Perplexity by the strided protocol that Hugging Face describes ("Perplexity of fixed-length models").

A text is cut into windows of `context` tokens that begin every `stride` tokens. Each window starts anew, with BOS where
the tokenizer puts one before a text: it counts in the context and is never scored. Each token is scored once, in the
first window it is in, with all of that window before it; so every token but those of the first window has at least
`context - stride` tokens before it. Without BOS the first token of the text has nothing before it and is not
scored, nor is that of any window where windows do not overlap. Perplexity is exp of the mean negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.config import RunConfig
from flashinfer.engine import Model
from flashinfer.text import Tokenizer

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

ROWS = 8
"""Rows of `[tokens, vocab]` that are worked on at once."""
OnChunk = Callable[[Floats, Ids], None]
"""Told of scored tokens, in order: log-probabilities `[tokens, vocab]` that it may keep, and the tokens `[tokens]`."""


@dataclass(frozen=True)
class Protocol:
    """How a text is scored. context: tokens of a window, BOS among them. bos: its id, None where there is none.

    Raises ValueError where that scores nothing, or leaves tokens out.
    """

    context: int
    stride: int
    bos: int | None

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"a context of {self.context} leaves nothing to predict; it takes at least 2 tokens")
        if not 1 <= self.stride <= self.room:
            raise ValueError(f"the stride must lie in 1..{self.room}, the tokens of a window, not {self.stride}")

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.context - (self.bos is not None)

    def scored(self, tokens: int) -> int:
        """How many of so many tokens are scored."""
        return sum(w.end - w.scored for w in self.windows(tokens))

    def run(self, tokens: int) -> int:
        """How many tokens the model is given to score so many."""
        return sum(w.end - w.begin + (self.bos is not None) - 1 for w in self.windows(tokens))

    def windows(self, tokens: int) -> list[Window]:
        """As `windows`, without what has nothing before it."""
        cut = windows(tokens, self.room, self.stride)
        if self.bos is not None:
            return cut
        return [Window(w.begin, w.end, max(w.scored, w.begin + 1)) for w in cut if w.end > w.begin + 1]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Tokens begin .. end of a text, of which those from `scored` on are scored."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True)
class Score:
    """Sum of the negative log-likelihoods in nats, and of how many tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Infinite where a token had no probability."""
        return math.exp(min(self.nll / self.tokens, 709.0)) if math.isfinite(self.nll) else math.inf


def windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Windows over so many tokens: each token is scored once; the last window may be shorter. Pure."""
    starts = range(0, max(1, tokens - context + stride), stride)
    ends = [min(begin + context, tokens) for begin in starts]
    return [Window(begin, end, scored) for begin, (scored, end) in zip(starts, pairwise([0, *ends]), strict=True)]


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The BOS of the protocol: the token that this tokenizer puts before every text, if it does."""
    first = tokenizer.encode("a")[:1]
    return tokenizer.bos_id if first == [tokenizer.bos_id] else None


def perplexity(
    model: Model,
    ids: Ids,
    protocol: Protocol,
    *,
    chunk: int = RunConfig.prefill_chunk,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_chunk: OnChunk | None = None,
) -> Score:
    """Score a text under a model whose context is at least the protocol's; one session, `chunk` tokens at a time.

    Beside the model's own memory it takes `chunk_bytes`, and what `on_chunk` takes.

    progress: tokens scored, and tokens to score.

    Raises:
        ValueError: no token can be scored. Else what `Model.logits` raises.
    """
    cut = protocol.windows(len(ids))
    total = sum(w.end - w.scored for w in cut)
    if total == 0:
        raise ValueError("there is no token with one before it")
    nll, done = 0.0, 0
    session = model.session(protocol.context)
    try:
        for window in cut:
            session.truncate(0)
            for logits, targets in _scored(model, session, _tokens(ids, window, protocol), window, chunk):
                normalise(logits)
                nll -= float(logits[np.arange(len(targets)), targets].sum(dtype=np.float64))
                if on_chunk is not None:
                    on_chunk(logits, targets)
                done += len(targets)
                progress(done, total)
    finally:
        session.close()
    return Score(nll, total)


def _tokens(ids: Ids, window: Window, protocol: Protocol) -> Ids:
    text = ids[window.begin : window.end]
    return text if protocol.bos is None else np.concatenate([[protocol.bos], text])


def _scored(model: Model, session: Any, tokens: Ids, window: Window, chunk: int) -> Iterator[tuple[Floats, Ids]]:
    """Run a window's tokens; logits after those whose next token is scored, and that next token.

    Whole chunks before the first of them are run without the head; the last token is not run at all.
    """
    first = len(tokens) - (window.end - window.scored) - 1
    start = first // chunk * chunk
    if start:
        model.step(session, tokens[:start].tolist())
    for begin in range(start, len(tokens) - 1, chunk):
        end = min(begin + chunk, len(tokens) - 1)
        logits = model.logits(session, tokens[begin:end].tolist())
        skip = max(0, first - begin)
        yield logits[skip:], tokens[begin + skip + 1 : end + 1]


def normalise(logits: Floats) -> None:
    """Logits `[tokens, vocab]` to natural log-probabilities, in place; the sums are of float64."""
    for start in range(0, len(logits), ROWS):
        rows = logits[start : start + ROWS]
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, dtype=np.float64, keepdims=True))


def chunk_bytes(vocab: int, chunk: int) -> int:
    """Memory that `perplexity` takes for the logits of a chunk: the backend's and the caller's copy, and some rows."""
    return 4 * vocab * (2 * (chunk + 16) + 4 * ROWS)
