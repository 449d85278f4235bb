"""One decoder for every family: the arithmetic of a step, driven by declared facts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Buffer
from flashinfer.config import TILE_NEURONS, TILE_ROWS, TILE_TOKENS, KvType
from flashinfer.ledger import Ledger
from flashinfer.model.rotary import rotary_tables
from flashinfer.model.rows import Rows
from flashinfer.model.weights import Weights, decode_tiles
from flashinfer.predict import Everything, Exact, Predictor
from flashinfer.store.facts import Facts
from flashinfer.store.geometry import round_up

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def prefill_tiles(needed: Index, neurons: int) -> Index:
    """Tiles of consecutive neuron indices, each neuron at the same place whatever the chunk; tiles that nobody
    needs are left out (they would add exact zeros), other neurons that nobody needs are -1."""
    tiles = np.full((-(-neurons // TILE_NEURONS), TILE_NEURONS), -1, dtype=np.int64)
    tiles.reshape(-1)[needed] = needed
    return tiles[(tiles >= 0).any(axis=1)]


class Decoder:
    """Runs tokens through the layers. Holds no per-session state.

    naive: select every neuron even where the activation is sparse (the baseline that reads everything).
    """

    def __init__(
        self,
        facts: Facts,
        weights: Weights,
        context: int,
        *,
        window: int,
        naive: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        self.facts, self.weights, self.backend = facts, weights, weights.backend
        self._span = (ledger or Ledger()).span
        self._window = window
        self._predictor: Predictor = Exact() if facts.sparse and not naive else Everything()
        # whole tiles: the padding rows of a prompt's last tile may stand for positions beyond the context
        self._tables = rotary_tables(facts.rope, round_up(context, TILE_TOKENS)) if facts.rope else None

    def new_kv(self, capacity: int, kv_type: KvType) -> list[Buffer]:
        """Empty keys and values for every layer."""
        f = self.facts
        return [self.backend.new_kv(f.num_kv_heads, f.head_dim, capacity, kv_type) for _ in range(f.num_layers)]

    def forward(self, tokens: Index, rows: Rows, kv: list[Buffer]) -> Buffer:
        """Hidden states `[rows.total, hidden]` after the last layer. Writes `kv` at the rows' positions."""
        with self._span("embedding"):
            x = self._embed(tokens, rows)
        for layer in range(self.facts.num_layers):
            with self._span("attention", layer):
                x = self._block(x, f"layers.{layer}.attn", partial(self._attention, layer, rows=rows, kv=kv[layer]))
            with self._span("ffn", layer):
                x = self._block(x, f"layers.{layer}.ffn", partial(self._ffn, layer, rows=rows))
        return x

    def head(self, x: Buffer) -> Floats:
        """Logits `[tokens, vocab]` of hidden states, on the host."""
        with self._span("head"):
            if self.facts.final_norm:
                x = self._norm(x, "final_norm")
            if self.weights.has("project_out.weight"):
                x = self._linear(x, "project_out")
            return self.backend.fetch(self._linear(x, "embed" if self.facts.tied_head else "head"))

    # -- parts

    def _embed(self, tokens: Index, rows: Rows) -> Buffer:
        padded = np.zeros((rows.total, self.facts.embed_size), dtype=np.float32)
        padded[rows.skip : rows.skip + rows.count] = self.weights.lookup("embed.weight", tokens)
        x = self.backend.place(padded)
        if self.weights.has("project_in.weight"):
            x = self._linear(x, "project_in")
        if self.weights.has("embed.positions"):
            at = np.arange(rows.start, rows.end) + self.facts.position_offset
            learned = np.zeros((rows.total, self.facts.hidden_size), dtype=np.float32)
            learned[rows.skip : rows.skip + rows.count] = self.weights.lookup("embed.positions", at)
            x = self.backend.add(x, self.backend.place(learned))
        return x

    def _block(self, x: Buffer, name: str, part: Callable[[Buffer], Buffer]) -> Buffer:
        """A residual block, normed before (almost everyone) or after (OPT-350m)."""
        if self.facts.norm_position == "pre":
            return self.backend.add(x, part(self._norm(x, f"{name}.norm")))
        return self._norm(self.backend.add(x, part(x)), f"{name}.norm")

    def _norm(self, x: Buffer, name: str) -> Buffer:
        weight, bias = self.weights.vector(f"{name}.weight"), self.weights.vector(f"{name}.bias")
        return self.backend.norm(x, weight, bias, self.facts.norm, self.facts.norm_eps)

    def _linear(self, x: Buffer, name: str) -> Buffer:
        out = self.backend.zeros(len(x), self.weights.rows_of(f"{name}.weight"))
        for first, block in self.weights.blocks(f"{name}.weight"):
            assert first % TILE_ROWS == 0
            self.backend.linear(out, first, x, block)
        bias = self.weights.vector(f"{name}.bias")
        return out if bias is None else self.backend.add(out, bias)

    def _attention(self, layer: int, x: Buffer, rows: Rows, kv: Buffer) -> Buffer:
        f, name = self.facts, f"layers.{layer}.attn"
        q, k, v = (self._linear(x, f"{name}.{part}") for part in "qkv")
        if self._tables is not None:
            cos, sin = (t[rows.first : rows.first + rows.total] for t in self._tables)
            q, k = (self.backend.rotate(y, f.head_dim, cos, sin) for y in (q, k))
        self.backend.append_kv(kv, rows.start, k, v, rows.skip, rows.count)
        return self._linear(self.backend.attend(q, kv, rows.first, f.num_heads), f"{name}.o")

    def _ffn(self, layer: int, x: Buffer, rows: Rows) -> Buffer:
        f, name = self.facts, f"layers.{layer}.ffn"
        gate = self._linear(x, f"{name}.{f.decision}")
        signs = self.backend.positive(gate, rows.skip, rows.count) if self._predictor.wants_signs else None
        selection = self._predictor.select(signs, f.intermediate_size, self._window)
        needed = selection.needed
        tiles = decode_tiles(needed) if rows.total == 1 else prefill_tiles(needed, f.intermediate_size)
        fired = self.backend.fire(gate, f.activation, tiles)
        out = self.backend.zeros(rows.total, f.hidden_size)
        for group in self.weights.neurons(layer, selection, tiles):
            part = fired[group.first : group.last]
            self.backend.ffn(out, x, part, group.memory, group.offsets, self.weights.bundle(layer))
        bias = self.weights.vector(f"{name}.down.bias")
        return out if bias is None else self.backend.add(out, bias)
