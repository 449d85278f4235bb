"""Token ids to force through a model: of any text, word by word, or of a made-up one."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np

from .shapes import FIRST_WORD

_PIECES = re.compile(r"\w{1,8}|[^\w\s]", re.UNICODE)
_SYLLABLES = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]

LEXICON = 20_000
FLATTENING = 4.0
"""Added to a word's rank in Zipf's law, so that the commonest word is about one in twenty-five."""
REPEATED = 0.25
"""Share of the words that repeat one of the last `MEMORY`: texts return to what they are about."""
MEMORY = 80


def token_ids(text: str, vocab: int) -> list[int]:
    """Ids of a text's words (of eight characters at most) and signs: equal words have equal ids.

    A synthetic model knows no language; what counts is how often and how soon a text returns to a word.
    """
    words = _PIECES.findall(text)
    return [FIRST_WORD + zlib.crc32(word.encode()) % (vocab - FIRST_WORD) for word in words]


def pseudo_text(words: int, seed: int = 0) -> str:
    """Made-up words with the repetition statistics of a text: Zipf's law, bursts, and sentences."""
    rng = np.random.default_rng([seed, 0x7E87])
    weight = 1 / (np.arange(LEXICON) + 1 + FLATTENING)
    drawn = rng.choice(LEXICON, size=words, p=weight / weight.sum())
    out: list[int] = []
    text: list[str] = []
    for n, word in enumerate(drawn):
        if rng.random() < REPEATED and len(out) > 10:
            word = out[-1 - int(rng.integers(min(MEMORY, len(out))))]
        out.append(int(word))
        text.append(_spell(int(word)) + ("." if n % 14 == 13 else "," if rng.random() < 0.05 else ""))
    return " ".join(text)


def lexicon() -> list[str]:
    """The words of `pseudo_text`, the commonest first."""
    return [_spell(word) for word in range(LEXICON)]


def _spell(word: int) -> str:
    base = len(_SYLLABLES)
    spelled = _SYLLABLES[word % base]
    while word := word // base:
        spelled += _SYLLABLES[word % base]
    return spelled


def ids_of(path: Path | None, vocab: int, count: int, seed: int = 1) -> list[int]:
    """`count` token ids of the file at `path`, or of the made-up text.

    Raises:
        ValueError: the file has fewer.
    """
    text = pseudo_text(count, seed) if path is None else path.read_text(encoding="utf-8", errors="replace")
    ids = token_ids(text, vocab)[:count]
    if len(ids) < count:
        raise ValueError(f"{path} has only {len(ids)} of the {count} tokens asked for; give a longer text")
    return ids
