"""Training a low-rank predictor: gradients by hand, on numpy or on torch, one code for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np

from flashinfer.tune.lowrank import Factors, Floats
from flashinfer.tune.samples import Block

CLIP: Final = 30.0
"""Scores beyond it have the gradient of this one; it keeps exp from overflowing."""
FAVOUR: Final = 3.0
"""Weight of the neurons that fire, together, against the others: so the low rank is spent where recalls of 0.9 and more
are decided. Against 1, up to 11 % fewer are named at a recall of 0.99, and 2 % more at 0.9 (embedded model)."""
FLOAT: Final = 4
STEADY: Final = 1e-12
"""Keeps Adam from dividing by 0."""


@dataclass(frozen=True)
class Arrays:
    """Where the arithmetic of `train` runs. xp: the module (numpy, torch); put: to its arrays; get: back."""

    xp: Any
    put: Callable[[Any], Any]
    get: Callable[[Any], Any]


NUMPY: Final = Arrays(np, np.array, np.asarray)


def torch_arrays(device: str) -> Arrays:
    """Arrays of torch on that device. Raises what torch raises where it is not there."""
    import torch

    return Arrays(torch, lambda a: torch.tensor(a, device=device), lambda t: t.cpu().numpy())


@dataclass(frozen=True)
class Training:
    """How a predictor is trained (Adam, Kingma and Ba, arXiv 1412.6980, its steps shrinking linearly to 0).

    batch: samples to a step. epochs: turns over the samples. rate: size of the first steps, as a share of the mean
    size of what they change (for the biases in log-odds). decay, decay2: of Adam's two means.
    """

    batch: int = 128
    epochs: float = 4.0
    rate: float = 0.1
    decay: float = 0.9
    decay2: float = 0.99

    def steps(self, samples: int) -> int:
        """Steps for so many samples, at least one."""
        return max(1, round(samples * self.epochs / self.batch))


def balance(density: float) -> float:
    """What a missed neuron weighs in the loss, against one named in vain, when a share `density` of them fires: as many
    times more as there are more that do not fire, so that both sides weigh the same; and `FAVOUR` times that."""
    density = min(max(density, 1e-4), 0.5)
    return FAVOUR * (1 - density) / density


def gradients(at: Arrays, values: Sequence[Any], x: Any, fired: Any, weight: Any) -> list[Any]:
    """Gradients of the loss by the factors `[a, b, bias]`, for a batch.

    The loss is the mean over the samples of the sum over the neurons of `log(1 + exp(score))` where the neuron did not
    fire, and of `weight * log(1 + exp(-score))` where it did. fired: 1 and 0, `[samples, neurons]`, is overwritten;
    weight: a number, or one for each neuron.
    """
    a, b, bias = values
    inner = x @ a.T
    error = inner @ b.T
    error += bias
    at.xp.clip(error, -CLIP, CLIP, out=error)
    error *= -1.0
    at.xp.exp(error, out=error)
    error += 1.0
    at.xp.reciprocal(error, out=error)
    error -= fired
    fired *= weight - 1.0
    fired += 1.0
    error *= fired
    error *= 1.0 / len(x)
    return [(error @ b).T @ x, error.T @ inner, error.sum(0)]


def loss(factors: Factors, block: Block, weight: float | Floats) -> float:
    """What `gradients` is the gradient of, in float64; for tests and for watching."""
    scores = factors.score(block.x).astype(np.float64)
    each = np.where(block.active, weight * np.logaddexp(0, -scores), np.logaddexp(0, scores))
    return float(each.sum() / len(block.x))


def train(
    start: Factors,
    batches: Iterator[Block],
    steps: int,
    *,
    weight: float | Floats,
    training: Training | None = None,
    arrays: Arrays = NUMPY,
    progress: Callable[[int, int], None] | None = None,
) -> Factors:
    """Factors trained from `start` on so many batches.

    The same batches give the same factors, bit for bit, on the same machine with the same threads. weight: what missing
    a neuron weighs against naming one in vain (see `balance`), for all or `[neurons]`. progress: told steps done and
    in all.
    """
    training = training or Training()
    values = [arrays.put(v) for v in (start.a, start.b, start.bias)]
    adam = [_Adam(arrays.xp, v, size) for v, size in zip(values, (_size(start.a), _size(start.b), 1.0), strict=True)]
    heavy = weight if isinstance(weight, float) else arrays.put(weight)
    for done, block in enumerate(islice(batches, steps)):
        x, fired = arrays.put(block.x), arrays.put(block.active.astype(np.float32))
        for value, gradient in zip(adam, gradients(arrays, values, x, fired, heavy), strict=True):
            value.step(gradient, done, training.rate * (1 - done / steps), training)
        if progress is not None:
            progress(done + 1, steps)
    return Factors(*(arrays.get(v) for v in values))


class _Adam:
    """One value on its way. `size`: what steps are relative to."""

    def __init__(self, xp: Any, value: Any, size: float) -> None:
        self._xp, self._value, self._size = xp, value, size
        self._mean, self._square = xp.zeros_like(value), xp.zeros_like(value)

    def step(self, gradient: Any, done: int, rate: float, training: Training) -> None:
        """Move the value after `done` steps. The gradient is overwritten."""
        first, second = 1 - training.decay ** (done + 1), 1 - training.decay2 ** (done + 1)
        self._mean *= training.decay
        self._mean += (1 - training.decay) * gradient
        gradient *= gradient
        self._square *= training.decay2
        gradient *= 1 - training.decay2
        self._square += gradient
        self._xp.sqrt(self._square, out=gradient)
        gradient += STEADY
        self._value -= (rate * self._size * math.sqrt(second) / first) * self._mean / gradient


def _size(values: Floats) -> float:
    """Root of the mean square, 1 where that is 0."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) or 1.0


def train_bytes(hidden: int, neurons: int, rank: int, batch: int) -> int:
    """Memory `train` takes at most on numpy, start and batch included, the pool of samples not."""
    values = rank * (hidden + neurons) + neurons
    return FLOAT * (7 * values + batch * (3 * neurons + 3 * hidden + 2 * rank)) + 2 * batch * neurons
