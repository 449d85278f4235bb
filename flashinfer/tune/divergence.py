"""How far next-token distributions lie from those of a reference, which wait in a file: never all in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashinfer.store import Store
from flashinfer.tune.perplexity import ROWS
from flashinfer.tune.scratch import UnnamedFile, folders_for

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Distributions:
    """Rows of log-probabilities `[vocab]`, on disk. Use as a context manager.

    They are kept as float32, though half would do for people: a predictor that changes nothing must show a divergence
    of zero and full agreement, not the rounding of a file.
    """

    def __init__(self, store: Store, tokens: int) -> None:
        """For the next-token distributions of at most so many tokens. Raises DiskFullError, StoreError."""
        self._vocab, self._rows = store.manifest.facts.vocab_size, 0
        size = 4 * self._vocab * tokens
        self._file = UnnamedFile(folders_for(store), size, f"the distributions of {tokens} tokens")

    def append(self, logs: Floats, _: Ids) -> None:
        """Put log-probabilities `[tokens, vocab]` behind those there are. Raises DiskFullError, StoreError."""
        self._file.write(4 * self._vocab * self._rows, np.ascontiguousarray(logs).data.cast("B"))
        self._rows += len(logs)

    def rows(self, first: int, count: int) -> Floats:
        """Some of them, `[count, vocab]`."""
        data = self._file.read(4 * self._vocab * first, 4 * self._vocab * count)
        return np.frombuffer(data, dtype=np.float32).reshape(count, -1)

    def __enter__(self) -> Distributions:
        return self

    def __exit__(self, *_: object) -> None:
        """They are gone."""
        self._file.close()


class Divergence:
    """Sums over tokens of how another's distributions differ from the reference's, told in the same order."""

    def __init__(self, reference: Distributions) -> None:
        self._reference = reference
        self._kl, self._same, self._tokens = 0.0, 0, 0

    def add(self, logs: Floats, _: Ids) -> None:
        """The other's log-probabilities `[tokens, vocab]` of the next tokens."""
        for start in range(0, len(logs), ROWS):
            q = logs[start : start + ROWS]
            p = self._reference.rows(self._tokens, len(q))
            self._same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            terms = p - q
            terms *= np.exp(p)
            self._kl += float(terms.sum(dtype=np.float64))
            self._tokens += len(q)

    @property
    def kl(self) -> float:
        """Mean of KL(reference || other), in nats per token."""
        mean = self._kl / self._tokens
        return 0.0 if mean < 0.0 else mean  # by rounding; what is not a number stays one

    @property
    def agreement(self) -> float:
        """Share of tokens at which both find the same next token most probable."""
        return self._same / self._tokens
