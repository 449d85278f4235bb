"""What becomes of queries and keys between their matrices and attention: norms, rotary positions, a scale."""

from __future__ import annotations

import math
from typing import Literal

from flashinfer.backend import Buffer
from flashinfer.config import TILE_TOKENS
from flashinfer.model.rotary import rotary_tables
from flashinfer.model.rows import Rows
from flashinfer.model.weights import Weights
from flashinfer.store.facts import Facts
from flashinfer.store.geometry import round_up


class Heads:
    """Queries `[tokens, heads * head_dim]` and keys `[tokens, kv heads * head_dim]` of a model of these facts.

    context: the most positions there will be.
    """

    def __init__(self, facts: Facts, weights: Weights, context: int) -> None:
        self._facts, self._weights, self._backend = facts, weights, weights.backend
        # whole tiles: the padding rows of a prompt's last tile may stand for positions beyond the context
        positions = round_up(context, TILE_TOKENS)
        ropes = {facts.rope_of(i) for i in range(facts.num_layers)}
        self._tables = {
            rope: [self._backend.vector(table) for table in rotary_tables(rope, positions, context)]
            for rope in ropes
            if rope is not None
        }

    def prepare(self, layer: int, part: Literal["q", "k"], x: Buffer, rows: Rows) -> Buffer:
        """Queries or keys of a layer as attention wants them, which divides products by `sqrt(head_dim)`. May
        overwrite `x`."""
        f, norm = self._facts, f"layers.{layer}.attn.{part}_norm"
        x = (
            self._norm(norm, self.turn(layer, x, rows))
            if f.turned_first
            else self.turn(layer, self._norm(norm, x), rows)
        )
        if part == "q" and f.attention_scale is not None:
            x = self._backend.multiply(x, f.attention_scale * math.sqrt(f.head_dim))
        return x

    def turn(self, layer: int, x: Buffer, rows: Rows, *, shared: bool = False) -> Buffer:
        """Rotary positions on whole heads; or on the turned part alone `[tokens, rotary_dim]`, which heads share."""
        if (rope := self._facts.rope_of(layer)) is None:
            return x
        dim = rope.rotary_dim if shared else self._facts.head_dim
        cos, sin = self._tables[rope]
        return self._backend.rotate(x, dim, cos, sin, rows.first)

    def _norm(self, name: str, x: Buffer) -> Buffer:
        f, backend = self._facts, self._backend
        if f.qk_norm == "none":
            return x
        weight, bias = self._weights.vector(f"{name}.weight"), self._weights.vector(f"{name}.bias")
        if f.qk_norm != "heads":
            size = f.head_dim if f.qk_norm == "head" else None
            return backend.norm(x, weight, bias, f.norm, f.norm_eps, size)
        x = backend.norm(x, None, None, f.norm, f.norm_eps, f.head_dim)
        x = x if weight is None else backend.multiply(x, weight)
        return x if bias is None else backend.add(x, bias)
