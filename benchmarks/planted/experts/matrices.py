"""What each tensor of a mixture is: noise of some scale, and what is planted on it.

The residual stream holds a latent of the token (in its embedding), its mean over the last few tokens and over the last
dozens, and something constant, in subspaces of their own; the rest is noise. The attention of layer 0 writes the means,
with heads whose scores fall with the distance (`recency`). All later attention, and all experts, add noise that depends
on what they are given. A router's row reads a random direction of each latent, and the constant: who is popular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import recency
from .locality import Mix
from .shape import MixtureShape

Floats = npt.NDArray[np.float32]

RMS = 0.1
"""Of the residual stream behind layer 0."""
TOKEN, SHORT, LONG, ANCHOR, REST = 0.2, 0.15, 0.15, 0.2, 0.3
"""Shares of its power: the token's latent, its two running means, the constant, noise."""
EMBEDDED = TOKEN + ANCHOR + REST
"""Of these, what embeddings hold."""
WIDTH = 24
"""Dimensions of the latent and of each mean, where there is room."""
ADDED = 0.005
"""Power that attention or the experts of a layer add, at most, as a share of the stream's."""
FIRED, CHOSEN = 0.6, 0.42
"""Root mean square of silu of a standard normal number, and about the length of a token's shares of its experts."""


@dataclass(frozen=True)
class Matrix:
    """Noise of standard deviation `noise`, plus `left @ right`; with `clean`, the noise is first made orthogonal to
    the (orthonormal) rows of `right`."""

    noise: float
    left: Floats | None = None
    right: Floats | None = None
    clean: bool = False


class Matrices:
    """Every matrix and vector of a mixture, by name."""

    def __init__(self, shape: MixtureShape, mix: Mix, seed: int) -> None:
        self._shape, self._mix, self._seed = shape, mix, seed
        self._width = min(WIDTH, shape.hidden // 16)
        rng = np.random.default_rng([seed, 1])
        drawn = rng.standard_normal((shape.hidden, 3 * self._width + 1))
        self._basis = np.ascontiguousarray(np.linalg.qr(drawn)[0].T, dtype=np.float32)
        self._token, self._means, self._anchor = np.split(self._basis, [self._width, 3 * self._width])
        latents = rng.standard_normal((shape.vocab, self._width)).astype(np.float32)
        self._latents = latents / np.linalg.norm(latents, axis=1, keepdims=True)
        reads = rng.standard_normal((shape.kv_heads * shape.head_dim, self._width)) * self._width**-0.5
        self._reads = reads.astype(np.float32)
        self._queries, self._key, self._loudness = _heads(shape)

    def norm(self, name: str) -> float:
        """The weight of a norm, one for all its values: 1, but of the queries of layer 0, whose scores it spreads."""
        return self._loudness if name == "model.layers.0.self_attn.q_norm.weight" else 1.0

    def matrix(self, name: str) -> Matrix:
        """What the matrix of that name is."""
        if name == "model.embed_tokens.weight":
            return self._embedding()
        parts = name.split(".")
        if len(parts) < 4:
            return Matrix(self._shape.hidden**-0.5)  # the head
        layer, part = int(parts[2]), ".".join(parts[3:-1])
        if part == "mlp.gate":
            return self._router(layer)
        if part.startswith("self_attn."):
            return self._first(part[10]) if layer == 0 else self._attention(part[10])
        down = RMS * ADDED**0.5 / (FIRED * CHOSEN * self._shape.size**0.5)
        return Matrix(down if part.endswith("down_proj") else self._shape.hidden**-0.5)

    def _embedding(self) -> Matrix:
        constant = np.full((len(self._latents), 1), self._length(ANCHOR), dtype=np.float32)
        left = np.concatenate([self._length(TOKEN) * self._latents, constant], axis=1)
        return Matrix(RMS * REST**0.5, left, np.concatenate([self._token, self._anchor]))

    def _attention(self, part: str) -> Matrix:
        if part == "o":
            return Matrix(RMS * ADDED**0.5 * (self._shape.heads * self._shape.head_dim) ** -0.5)
        return Matrix(self._shape.hidden**-0.5)

    def _first(self, part: str) -> Matrix:
        """Attention of layer 0, whose input has root mean square 1: q and k are constant, v reads the token's latent,
        o makes latents of the heads' means again, in subspaces of their own."""
        heard = (TOKEN / EMBEDDED * self._shape.hidden) ** 0.5
        match part:
            case "q" | "k":
                return Matrix(0.0, self._queries if part == "q" else self._key, self._anchor)
            case "v":
                return Matrix(0.0, self._reads / np.float32(heard), self._token)
        half = self._shape.heads // 2
        every = self._reads.reshape(self._shape.kv_heads, self._shape.head_dim, -1)
        every = every.repeat(self._shape.heads // self._shape.kv_heads, axis=0)
        right = np.zeros((2 * self._width, self._shape.heads * self._shape.head_dim), dtype=np.float32)
        widths, middle = recency.widths(self._shape.heads), half * self._shape.head_dim
        for n, (heads, share) in enumerate(((slice(half), SHORT), (slice(half, None), LONG))):
            columns = slice(middle) if n == 0 else slice(middle, None)
            found = np.linalg.pinv(every[heads].reshape(-1, self._width))
            shrunk = float(np.mean(_shrunk(widths[heads])))
            right[n * self._width : (n + 1) * self._width, columns] = found * (self._length(share) / shrunk)
        return Matrix(0.0, np.ascontiguousarray(self._means.T), right)

    def _router(self, layer: int) -> Matrix:
        """Rows that hear each part as loudly as the mix says, in an input of root mean square 1."""
        rng, mix, hidden = np.random.default_rng([self._seed, 2, layer]), self._mix, self._shape.hidden
        parts = []
        for variance, share in ((mix.token, TOKEN), (mix.short, SHORT), (mix.long, LONG)):
            read = rng.standard_normal((self._shape.experts, self._width))
            read /= np.linalg.norm(read, axis=1, keepdims=True)
            parts.append(read * (variance * self._width / (share * hidden)) ** 0.5)
        parts.append(mix.popularity * rng.standard_normal((self._shape.experts, 1)) * (ANCHOR * hidden) ** -0.5)
        left = np.concatenate(parts, axis=1).astype(np.float32)
        return Matrix((mix.noise / (REST * hidden)) ** 0.5, left, self._basis, clean=True)

    def _length(self, share: float) -> np.float32:
        """Of a vector that holds that share of the stream's power."""
        return np.float32(RMS * (share * self._shape.hidden) ** 0.5)


def _shrunk(widths: Floats) -> Floats:
    """How long the mean of unrelated vectors of length 1 is, weighed by exp(-distance / width)."""
    return np.asarray(np.sqrt(np.tanh(0.5 / widths)))


def _heads(shape: MixtureShape) -> tuple[Floats, Floats, float]:
    """What q and k of layer 0 make of the constant, a column each, and the weight of the norm of the queries.

    Queries and keys are normed over each head, and a head that looks further back has smaller scores. So that all need
    the same weight, the last rotary pair, of which the keys have nothing, fills up what a head lacks.
    """
    half = shape.head_dim // 2
    frequencies = recency.rotary_frequencies(shape.head_dim, shape.theta)[:-1]
    series = [recency.score_series(width, frequencies, shape.context) for width in recency.widths(shape.heads)]
    queries = np.zeros((shape.heads, shape.head_dim), dtype=np.float32)
    for head, (a, b) in zip(queries, series, strict=True):
        head[: half - 1], head[half : 2 * half - 1] = a, -b
    loudest = np.linalg.norm(queries, axis=1).max()
    queries[:, half - 1] = np.sqrt(np.maximum(loudest**2 - np.square(queries).sum(axis=1), 0))
    key = np.zeros(shape.head_dim, dtype=np.float32)
    key[: half - 1] = 1
    # normed, a query is sqrt(head_dim) / loudest times this and a key sqrt(head_dim / (half - 1)); scores are divided
    # by sqrt(head_dim)
    loudness = float(loudest * ((half - 1) / shape.head_dim) ** 0.5)
    return queries.reshape(-1, 1), np.tile(key, shape.kv_heads).reshape(-1, 1), loudness
