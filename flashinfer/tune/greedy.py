"""How long a model says greedily what another said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashinfer.engine import Model
from flashinfer.tune.perplexity import Ids, Protocol

Progress = Callable[[int], None]
"""Told of tokens done."""
PROMPTS = 4
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Prompts:
    """Prompts, and how many tokens each is to be continued by."""

    ids: tuple[tuple[int, ...], ...]
    tokens: int


def prompts_of(ids: Ids, protocol: Protocol, tokens: int) -> Prompts:
    """PROMPTS stretches of a text, from its beginning to its end, each with the protocol's BOS; so short that `tokens`
    tokens more fit the context, or half a context, where that is less."""
    tokens = min(tokens, protocol.context // 2)
    length = min(PROMPT_TOKENS, len(ids), protocol.room - tokens)
    if length < 1 or tokens < 1:
        return Prompts((), 0)
    starts = np.unique(np.linspace(0, len(ids) - length, PROMPTS).astype(int)).tolist()
    bos = () if protocol.bos is None else (protocol.bos,)
    return Prompts(tuple((*bos, *ids[at : at + length].tolist()) for at in starts), tokens)


def continue_all(model: Model, prompts: Prompts, progress: Progress = lambda done: None) -> list[list[int]]:
    """What the model says greedily after each prompt."""
    session, said = model.session(), []
    for prompt in prompts.ids:
        session.truncate(0)
        logits = model.step(session, prompt)
        out: list[int] = []
        for _ in range(prompts.tokens):
            if out:
                logits = model.step(session, out[-1:])
            out.append(int(np.argmax(logits)))
        said.append(out)
        progress(len(said) * prompts.tokens)
    session.close()
    return said


def common_prefixes(
    model: Model, prompts: Prompts, said: Sequence[Sequence[int]], progress: Progress = lambda done: None
) -> tuple[int, ...]:
    """After each prompt, how many tokens this model says greedily as `said`, before it first says another."""
    session, lengths = model.session(), []
    for prompt, script in zip(prompts.ids, said, strict=True):
        session.truncate(0)
        logits, same = model.step(session, prompt), 0
        while same < len(script) and int(np.argmax(logits)) == script[same]:
            same += 1
            if same < len(script):
                logits = model.step(session, script[same - 1 : same])
        lengths.append(same)
        progress(len(lengths) * prompts.tokens)
    session.close()
    return tuple(lengths)
