"""Who is named beside who fires, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.model.observe import Mask, Observer, Seen
from flashinfer.store import Facts, Store
from flashinfer.store.roles import lowrank_role
from flashinfer.tune.samples import chosen
from flashinfer.tune.scratch import UnnamedFile, folders_for

Floats = npt.NDArray[np.float32]

SAMPLED = 1024
"""Tokens whose inputs are kept at most: with ten neurons firing, a recall of 98 % is then known to about 0.1 %."""
TOKENS = 64
"""Tokens whose scores are worked on at once."""


@dataclass(frozen=True)
class Named:
    """One layer, over some tokens. density: share of its neurons that a token names. recall: share of those that fire
    that are named (under thresholds: the share of what all add to the output, see `contribution`), None where it is not
    known. precision: share of the named that fire."""

    density: float
    recall: float | None
    precision: float


class Counter:
    """An observer that counts, in each layer, who is named and who of them fires."""

    def __init__(self, facts: Facts, *, complete: bool) -> None:
        """complete: whether the predictor names all that fire, so that its recall is known to be 1."""
        self._neurons = [facts.neurons(i) for i in range(facts.num_layers)]
        self._recall = 1.0 if complete else None
        self._tokens, self._needed, self._active = (np.zeros(facts.num_layers, dtype=np.int64) for _ in range(3))

    def seen(self, layer: int, step: Seen) -> None:
        """Count a step."""
        self._tokens[layer] += len(step.active)
        self._active[layer] += np.count_nonzero(step.active)
        self._needed[layer] += step.active.size if step.needed is None else np.count_nonzero(step.needed)

    def layers(self) -> tuple[Named, ...]:
        """What was counted, by layer."""
        counts = zip(self._tokens.tolist(), self._neurons, self._needed.tolist(), self._active.tolist(), strict=True)
        return tuple(_named(tokens * size, needed, active, self._recall) for tokens, size, needed, active in counts)


class Inputs:
    """An observer that keeps some tokens' FFN inputs, and who fired, on disk: SAMPLED of them, evenly spread. A context
    manager."""

    def __init__(self, store: Store, tokens: int) -> None:
        """tokens: how many will be seen. Raises DiskFullError, StoreError."""
        facts, self._total, self._wanted = store.manifest.facts, tokens, min(tokens, SAMPLED)
        self._hidden, self._neurons = facts.hidden_size, facts.intermediate_size
        self._row = 4 * self._hidden + -(-self._neurons // 8)
        self._seen, self._kept = [0] * facts.num_layers, [0] * facts.num_layers
        size = facts.num_layers * self._wanted * self._row
        self._file = UnnamedFile(folders_for(store), size, f"the inputs of {self._wanted} tokens")

    def seen(self, layer: int, step: Seen) -> None:
        """Keep some of a step's tokens. Raises DiskFullError, StoreError."""
        some = chosen(self._seen[layer], len(step.x), self._total, self._wanted)
        rows = np.concatenate([step.x[some].view(np.uint8), np.packbits(step.active[some], axis=1)], axis=1)
        self._file.write(self._place(layer, self._kept[layer]), memoryview(rows.tobytes()))
        self._seen[layer] += len(step.x)
        self._kept[layer] += len(some)

    def layer(self, layer: int, block: int) -> Iterator[tuple[Floats, Mask]]:
        """What was kept of a layer, at most `block` tokens at once: inputs `[tokens, hidden]` and who fired
        `[tokens, neurons]`."""
        for first in range(0, self._kept[layer], block):
            size = min(block, self._kept[layer] - first) * self._row
            data = self._file.read(self._place(layer, first), size)
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, self._row)
            x = np.ascontiguousarray(rows[:, : 4 * self._hidden]).view(np.float32)
            yield x, np.unpackbits(rows[:, 4 * self._hidden :], axis=1, count=self._neurons).astype(bool)

    def some(self, layer: int, most: int) -> Floats:
        """The inputs of at most so many tokens of a layer, evenly spread, `[tokens, hidden]`."""
        kept, found = self._kept[layer], []
        for n, (x, _) in enumerate(self.layer(layer, TOKENS)):
            found.append(x[chosen(n * TOKENS, len(x), kept, min(kept, most))])
        return np.concatenate(found)

    def _place(self, layer: int, row: int) -> int:
        return (layer * self._wanted + row) * self._row

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        """They are gone."""
        self._file.close()


class Together:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def seen(self, layer: int, step: Seen) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.seen(layer, step)


def lowrank_named(store: Store, inputs: Inputs, shifts: Sequence[Sequence[float]]) -> list[tuple[Named, ...]]:
    """Whom the store's low-rank factors name on these inputs, against who fired there, at several levels at once.

    shifts: of each level, what is added to the scores of each layer. Returns the layers of each level.

    Raises:
        StoreReadError: the factors cannot be read.
    """
    layers = range(store.manifest.facts.num_layers)
    by_layer = [_layer_named(store, inputs, layer, [shift[layer] for shift in shifts]) for layer in layers]
    return list(zip(*by_layer, strict=True))


def _layer_named(store: Store, inputs: Inputs, layer: int, shifts: Sequence[float]) -> list[Named]:
    a, b, bias = (store.read_tensor(lowrank_role(layer, part)) for part in ("a.weight", "b.weight", "b.bias"))
    cells, active, named, hit = 0, 0, [0] * len(shifts), [0] * len(shifts)
    for x, fired in inputs.layer(layer, TOKENS):
        scores = (x @ a.T) @ b.T
        scores += bias
        cells, active = cells + fired.size, active + int(np.count_nonzero(fired))
        for n, shift in enumerate(shifts):
            chosen = scores > -shift
            named[n] += int(np.count_nonzero(chosen))
            hit[n] += int(np.count_nonzero(chosen & fired))
    return [_named(cells, who, right, _share(right, active)) for who, right in zip(named, hit, strict=True)]


def _named(cells: int, named: int, right: int, recall: float | None) -> Named:
    return Named(_share(named, cells), recall, _share(right, named))


def _share(part: int, whole: int) -> float:
    """Of nothing, all."""
    return part / whole if whole else 1.0
