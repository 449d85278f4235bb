"""Low-rank predictors of who fires: two thin factors per layer, begun in closed form.

The score of a neuron is `b (a x) + bias`; above 0 it is named ("LLM in a flash", arXiv 2312.11514, section 3.1). `fit`
trains the factors, `frontier` measures them, `rank` chooses how large they are. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant import codec_named

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Rows = Callable[[], Iterable[Floats]]
"""One pass over the rows of a matrix, in order, in blocks `[some, hidden]` that may be overwritten by the next."""

SPARE: Final = 16
"""Directions followed beyond the rank asked, so that the last ones asked come out right, too."""
TURNS: Final = 2
"""Power iterations. What stays unexplained is twice the least possible with none, 15 % more than that with 1, 2-5 %
with 2 (embedded model); training makes up for the rest."""
FLAT: Final = 1e-8
"""A direction with less than this share of the largest variance is taken for noise, and not blown up."""
GAIN: Final = 2.0
"""Score of a neuron one deviation above its mean, before training, which ends the same for 1 to 3."""


@dataclass(frozen=True)
class Factors:
    """A layer's predictor. a: `[rank, hidden]`, b: `[neurons, rank]`, bias: `[neurons]`."""

    a: Floats
    b: Floats
    bias: Floats

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return len(self.a)

    def score(self, x: Floats) -> Floats:
        """Scores `[samples, neurons]` of inputs `[samples, hidden]`; above 0 a neuron is named."""
        scores: Floats = np.matmul(x @ self.a.T, self.b.T)
        return np.add(scores, self.bias, out=scores)


def stored(factors: Factors, codec: str) -> Factors:
    """The factors as they come back from a store with that codec.

    Raises:
        OverflowError: a value is beyond the codec's range.
    """
    a, b = (_stored(matrix, codec) for matrix in (factors.a, factors.b))
    return Factors(a, b, factors.bias)


def _stored(matrix: Floats, codec: str) -> Floats:
    coder = codec_named(codec)
    values: Floats = coder.decode(coder.encode(np.ascontiguousarray(matrix)))[:, : matrix.shape[1]]
    return np.ascontiguousarray(values)


def closed_form(rows: Rows, bias: Floats | None, inputs: Rows, rank: int, *, hidden: int, seed: int = 0) -> Factors:
    """The factors whose scores come closest, in the mean square over the inputs, to all decision products.

    Products are measured in each neuron's own deviation (as far as it follows from that of each input coordinate), so
    that all neurons count alike, and scores are `GAIN` times that. It is a reduced-rank regression (Izenman,
    "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5, 1975): the products
    projected on their leading directions, which are found by subspace iteration (Halko, Martinsson, Tropp,
    arXiv 0909.4061) in a few passes over either matrix. Nothing of hidden x hidden values is ever held.

    Args:
        rows: the decision matrix in the original order of the neurons; bias: its bias.
        inputs: FFN inputs, `[some, hidden]` at a time.
        rank: at most `hidden`.
        seed: of the directions begun with.

    Raises:
        ValueError: there is no input.
    """
    mean, deviation = moments(inputs, hidden)
    scales = _scales(rows, deviation)
    found = np.random.default_rng(seed).standard_normal((hidden, min(rank + SPARE, hidden)))
    for _ in range(TURNS):
        found = np.linalg.qr(_covary(inputs, mean, _square(rows, scales, found)))[0]
    basis, a, offset = _project(rows, scales, found, mean)
    spread = a @ _covary(inputs, mean, a.T)
    values, vectors = np.linalg.eigh((spread + spread.T) / 2)
    best, values = vectors[:, ::-1][:, :rank], values[::-1][:rank]
    # a coordinate of `a x` has deviation 1, so that steps of training are alike in all of them
    unit = np.sqrt(np.maximum(values, FLAT * values[0])) if values[0] > 0 else np.ones(len(values))
    first, second = (best.T @ a) / unit[:, None], (basis @ best) * (GAIN * unit)
    if bias is not None:
        offset = offset + bias / scales
    shift = GAIN * offset - second @ (first @ mean)
    return Factors(first.astype(np.float32), second.astype(np.float32), shift.astype(np.float32))


def closed_form_bytes(hidden: int, neurons: int, rank: int, block: int) -> int:
    """Memory `closed_form` takes at most, with blocks of so many rows and inputs, which are not counted themselves."""
    width = min(rank + SPARE, hidden)
    return 8 * width * (6 * hidden + 4 * neurons) + 8 * block * (hidden + width) + 16 * neurons


def moments(inputs: Rows, hidden: int) -> tuple[Doubles, Doubles]:
    """Mean and deviation of each input coordinate. Raises ValueError where there is no input."""
    count, total, squares = 0, np.zeros(hidden), np.zeros(hidden)
    for x in inputs():
        count += len(x)
        total += x.sum(axis=0, dtype=np.float64)
        squares += np.square(x, dtype=np.float64).sum(axis=0)
    if not count:
        raise ValueError("no inputs to fit a predictor to")
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _scales(rows: Rows, deviation: Doubles) -> Floats:
    """The deviation of each neuron's product if the input's coordinates were independent, 1 where that is 0."""
    squared = np.square(deviation).astype(np.float32)
    scales = np.sqrt(np.concatenate([np.square(block) @ squared for block in rows()]))
    return np.where(scales > 0, scales, np.float32(1))


def _scaled(rows: Rows, scales: Floats) -> Iterator[Floats]:
    """Blocks of the decision matrix, its rows divided by their scales."""
    at = 0
    for block in rows():
        yield block / scales[at : at + len(block), None]
        at += len(block)


def _square(rows: Rows, scales: Floats, found: Doubles) -> Doubles:
    """`W' W found` for the scaled decision matrix W."""
    out, right = np.zeros(found.shape), found.astype(np.float32)
    for block in _scaled(rows, scales):
        out += block.T @ (block @ right)
    return out


def _covary(inputs: Rows, mean: Doubles, found: Doubles) -> Doubles:
    """The inputs' covariance times `found`."""
    count, out, right = 0, np.zeros(found.shape), found.astype(np.float32)
    for x in inputs():
        centred = x - mean.astype(np.float32)
        out += centred.T @ (centred @ right)
        count += len(x)
    return out / count


def _project(rows: Rows, scales: Floats, found: Doubles, mean: Doubles) -> tuple[Floats, Doubles, Floats]:
    """An orthonormal basis of the products along `found`, `[neurons, width]`, what it makes of the scaled decision
    matrix, `[width, hidden]`, and the scaled products of the mean input, `[neurons]`."""
    right, centre = found.astype(np.float32), mean.astype(np.float32)
    parts = [(block @ right, block @ centre) for block in _scaled(rows, scales)]
    basis, offset = np.linalg.qr(np.concatenate([p for p, _ in parts]))[0], np.concatenate([o for _, o in parts])
    out, at = np.zeros((basis.shape[1], len(found))), 0
    for block in _scaled(rows, scales):
        out += basis[at : at + len(block)].T @ block
        at += len(block)
    return basis, out, offset
