"""Make a checkpoint whose forward pass has the statistics asked for, by running it while it is written.

The residual stream holds, in subspaces of its own, a latent of the token (in its embedding), a mean of it over
the last few tokens and one over the last dozens (written by attention heads that look that far back), something
constant (llama; the learned positions in OPT), and noise everywhere else, which FFN and attention add to. A
neuron's row of the gate (fc1) reads a random direction of each, and its threshold stands on the constant part
(the bias). How much of each, is solved for layer by layer on the states of a text that runs along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from . import recency
from .forward import norm, product, run
from .shapes import POSITION_OFFSET, Shape
from .solve import Knobs, Solver
from .statistics import Statistics, Thresholds
from .text import pseudo_text, token_ids
from .write import CheckpointWriter, Noise, pieces

Floats = npt.NDArray[np.float32]

RMS = 0.1
"""Of the residual stream at the start."""
TOKEN, SHORT, LONG, ANCHOR = 0.2, 0.15, 0.15, 0.2
"""Shares of its power: the token's latent, its two running means, the constant part or the positions."""
PER_BLOCK = {"attn.o": 0.02, "ffn.down": 0.04}
"""Power that a block adds as noise, as a share of the power at the start."""
NORM_SPREAD, BIAS_SPREAD, QK_NOISE, V_NOISE = 0.05, 0.001, 0.1, 0.3
TEXTS, TOKENS, WARM = 2, 144, 48
"""What runs along; nothing is measured on the first `WARM` tokens, whose running means are not settled."""
WIDTH = 24
SAMPLE = 1024
"""Neurons the statistics are solved on."""


def latent_width(shape: Shape) -> int:
    """Dimensions of the token's latent and of each running mean."""
    return min(WIDTH, shape.hidden // 16)


@dataclass(frozen=True)
class Plan:
    """A matrix to be made: noise of standard deviation `noise`, plus `left @ right`; with `clean`, the noise is
    first made orthogonal to the (orthonormal) rows of `right`."""

    noise: float
    left: Floats | None = None
    right: Floats | None = None
    bias: Floats | None = None
    clean: bool = False


class Planter:
    """Makes every matrix when the forward pass first asks for its product (see `forward.Products`)."""

    def __init__(self, writer: CheckpointWriter, shape: Shape, asked: Statistics, seed: int) -> None:
        self._writer, self._shape, self._asked = writer, shape, asked
        self._noise, self._rng = Noise(seed), np.random.default_rng([seed, 1])
        width = latent_width(shape)
        self._frequencies = (
            recency.rotary_frequencies(shape.head_dim)
            if shape.family == "llama"
            else recency.learned_frequencies(shape.head_dim)
        )
        anchors = 1 if shape.family == "llama" else 2 * len(self._frequencies)
        directions = self._rng.standard_normal((shape.hidden, 1 + 3 * width + anchors))
        directions[:, 0] = 1  # what LayerNorm takes away
        rows = np.linalg.qr(directions)[0].T[1:].astype(np.float32)
        self._basis = np.ascontiguousarray(rows)
        self._token, self._short, self._long, self._anchor = np.split(rows, [width, 2 * width, 3 * width])
        self._heads = self._head_vectors()
        self._plans: dict[str, Callable[[Floats, int], Plan]] = {
            "attn.q": lambda x, _: self._plan_queries(x, 0),
            "attn.k": lambda x, _: self._plan_queries(x, 1),
            "attn.v": self._plan_values,
            "attn.o": self._plan_output,
            "ffn.gate": self._plan_gate,
            "ffn.up": lambda x, _: Plan(shape.hidden**-0.5),
            "ffn.down": lambda x, _: Plan(self._block_noise(x, "ffn.down")),
        }
        self._reads = np.zeros((shape.hidden, width), dtype=np.float32)
        self._found = Knobs()

    def _head_vectors(self) -> tuple[Floats, Floats]:
        """What q and k make of the constant part, or of the positions: `[hidden, anchors]` each."""
        shape, make = self._shape, recency.rotary_queries
        if shape.family == "opt":
            make = recency.learned_queries
        heads = []
        for width in recency.widths(shape.heads):
            q, k = make(recency.score_series(width, self._frequencies, shape.context), shape.head_dim)
            heads.append((q.reshape(shape.head_dim, -1), k.reshape(shape.head_dim, -1)))
        q, k = (np.concatenate([head[i] for head in heads]) for i in (0, 1))
        return q, k

    # -- what forward asks for

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Write the embeddings; the rows of `ids`."""
        shape, width = self._shape, latent_width(self._shape)
        latents = self._rng.standard_normal((shape.vocab, width)).astype(np.float32)
        latents *= self._power(TOKEN) / np.linalg.norm(latents, axis=1, keepdims=True)
        plan = Plan(RMS * (1 - TOKEN - SHORT - LONG - ANCHOR) ** 0.5, latents, self._token)
        if shape.family == "llama":
            left = np.concatenate([latents, np.full((shape.vocab, 1), self._power(ANCHOR), np.float32)], axis=1)
            plan = Plan(plan.noise, left, np.concatenate([self._token, self._anchor]))
        x = self._lookup("embed.weight", plan, ids)
        if shape.family == "opt":
            positions = recency.learned_positions(self._frequencies, shape.context + POSITION_OFFSET)
            positions *= self._power(ANCHOR) / np.linalg.norm(positions, axis=1, keepdims=True)
            at = np.broadcast_to(np.arange(ids.shape[1]) + POSITION_OFFSET, ids.shape)
            x += self._lookup("positions.weight", Plan(RMS / 100, positions, self._anchor), at)
        return x

    def vectors(self, role: str, layer: int | None) -> tuple[Floats, Floats | None]:
        """Write a norm; its weight and bias."""
        weight = 1 + self._vector(f"{role}.weight", layer, NORM_SPREAD)
        self._writer.write(self._shape.name(f"{role}.weight", layer), 0, weight)
        if self._shape.gated:
            return weight, None
        bias = self._vector(f"{role}.bias", layer, BIAS_SPREAD)
        self._writer.write(self._shape.name(f"{role}.bias", layer), 0, bias)
        return weight, bias

    def linear(self, x: Floats, role: str, layer: int) -> Floats:
        """Write a matrix (and its bias); its product."""
        plan = self._plans[role](x, layer)
        name = self._shape.name(f"{role}.weight", layer)
        rows, columns = self._writer.shape_of(name)
        flat, out = x.reshape(-1, columns), np.empty((x.shape[0] * x.shape[1], rows), dtype=np.float32)
        for first, count in pieces(rows, columns):
            out[:, first : first + count] = product(flat, self._made(name, plan, first, count))
        if not self._shape.gated:
            bias = plan.bias if plan.bias is not None else self._vector(f"{role}.bias", layer, BIAS_SPREAD)
            self._writer.write(self._shape.name(f"{role}.bias", layer), 0, bias)
            out += bias
        return out.reshape(*x.shape[:2], rows)

    def finish(self, x: Floats) -> None:
        """Write what comes after the last layer."""
        norm(self._shape, self, x, "final_norm", None)
        if self._shape.family == "llama":
            name, plan = self._shape.name("head.weight"), Plan(self._shape.hidden**-0.5)
            for first, count in pieces(*self._writer.shape_of(name)):
                self._made(name, plan, first, count)

    # -- plans

    def _plan_queries(self, x: Floats, which: int) -> Plan:
        """q (0) or k (1)."""
        seen = product(x[:, WARM:], self._anchor)
        scale = seen.mean() if self._shape.family == "llama" else np.sqrt(2 * (seen * seen).mean())
        return Plan(QK_NOISE * self._shape.hidden**-0.5, self._heads[which] / scale, self._anchor)

    def _plan_values(self, x: Floats, layer: int) -> Plan:
        """Every head reads the token's latent, each through a random matrix."""
        self._reads = self._rng.standard_normal(self._reads.shape).astype(np.float32) * self._reads.shape[1] ** -0.5
        return Plan(V_NOISE * self._shape.hidden**-0.5, self._reads / _rms(product(x, self._token)), self._token)

    def _plan_output(self, x: Floats, layer: int) -> Plan:
        """The heads' means become latents again, in the subspaces of the running means. Layer 0 writes them; later
        layers add a little to what is there."""
        half = self._shape.heads // 2 * self._shape.head_dim
        right = np.zeros((2 * self._reads.shape[1], self._shape.hidden), dtype=np.float32)
        width = self._reads.shape[1]
        for rows, heads in ((slice(width), slice(half)), (slice(width, None), slice(half, None))):
            reads = self._reads[heads]
            right[rows, heads] = np.linalg.solve(reads.T @ reads, reads.T)
        means = product(x[:, WARM:], right)
        right[:width] *= self._power(SHORT) * width**-0.5 / _rms(means[..., :width])
        right[width:] *= self._power(LONG) * width**-0.5 / _rms(means[..., width:])
        if layer:
            right /= self._shape.layers
        left = np.concatenate([self._short, self._long]).T
        return Plan(self._block_noise(x, "attn.o"), np.ascontiguousarray(left), right)

    def _plan_gate(self, x: Floats, layer: int) -> Plan:
        """Who listens to what, and from which threshold on."""
        neurons = self._shape.ffn
        deviates = self._rng.standard_normal(neurons)
        spaces, reads, parts = (self._token, self._short, self._long), [], []
        sample, seen = min(neurons, SAMPLE), x[:, WARM:]
        for space in spaces:
            read = self._rng.standard_normal((neurons, len(space))).astype(np.float32)
            read /= np.linalg.norm(read, axis=1, keepdims=True)
            heard = product(seen, space)
            read /= _rms(heard)
            reads.append(read)
            parts.append(product(heard, read[:sample]))
        rest = seen - product(product(seen, self._basis), self._basis.T)
        name = self._shape.name("ffn.gate.weight", layer)
        noise = product(rest, self._noise.rows(self._writer.index[name], 0, sample, self._shape.hidden))
        loudness = _rms(noise)
        parts.append(noise / loudness)
        mix, self._found = Solver(parts, Thresholds(self._asked, deviates[:sample]), self._asked).solve(self._found)
        left = np.zeros((neurons, len(self._basis)), dtype=np.float32)
        planted = np.concatenate([w * r for w, r in zip(mix.weights[:3], reads, strict=True)], axis=1)
        left[:, : planted.shape[1]] = planted
        silence = -(Thresholds(self._asked, deviates).at(self._found.spread) + np.float32(mix.shift))
        if self._shape.gated:
            left[:, -1] = silence / product(seen, self._anchor).mean()
        return Plan(mix.noise / loudness, left, self._basis, silence, clean=True)

    # -- parts

    def _power(self, share: float) -> np.float32:
        """Length of a vector that holds that share of the stream's power."""
        return np.float32(RMS * (share * self._shape.hidden) ** 0.5)

    def _block_noise(self, x: Floats, role: str) -> float:
        """Scale of a matrix of noise that adds `PER_BLOCK` when it is applied to `x`."""
        length = np.sqrt((x[:, WARM:] ** 2).sum(axis=-1).mean())
        return float(RMS * PER_BLOCK[role] ** 0.5 / length)

    def _vector(self, role: str, layer: int | None, spread: float) -> Floats:
        name = self._shape.name(role, layer)
        return np.float32(spread) * self._noise.rows(
            self._writer.index[name], 0, 1, self._writer.shape_of(name)[0]
        ).reshape(-1)

    def _made(self, name: str, plan: Plan, first: int, count: int) -> Floats:
        """Write rows of a matrix; their values before rounding."""
        values = self._noise.rows(self._writer.index[name], first, count, self._writer.shape_of(name)[1])
        values *= np.float32(plan.noise)
        if plan.left is not None and plan.right is not None:
            made, left, right = (torch.from_numpy(m) for m in (values, plan.left[first : first + count], plan.right))
            made.addmm_(left - made @ right.T if plan.clean else left, right)
        self._writer.write(name, first, values)
        return values

    def _lookup(self, role: str, plan: Plan, ids: npt.NDArray[np.int64]) -> Floats:
        """Write a table; the rows of `ids`."""
        name = self._shape.name(role)
        rows, columns = self._writer.shape_of(name)
        out = np.empty((*ids.shape, columns), dtype=np.float32)
        for first, count in pieces(rows, columns):
            made, here = self._made(name, plan, first, count), (ids >= first) & (ids < first + count)
            out[here] = made[ids[here] - first]
        return out


def _rms(x: Floats) -> np.float32:
    return np.float32(np.sqrt((x * x).mean()))


def write_planted(out: Path, shape: Shape, asked: Statistics, seed: int = 0) -> int:
    """A checkpoint with planted statistics (ReLU only); returns the bytes of its weights."""
    assert shape.activation == "relu"
    texts = [token_ids(pseudo_text(TOKENS, 1000 + n), shape.vocab) for n in range(TEXTS)]
    ids = np.array([text[:TOKENS] for text in texts])
    with CheckpointWriter(out, shape) as writer:
        planter = Planter(writer, shape, asked, seed)
        planter.finish(run(shape, planter, ids))
    return shape.weight_bytes()
