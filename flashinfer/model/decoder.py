"""One decoder for every family: the arithmetic of a step, driven by declared facts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Buffer
from flashinfer.choice import Choice
from flashinfer.config import TILE_ROWS, KvType
from flashinfer.ledger import Ledger
from flashinfer.model.adapter import Adapter
from flashinfer.model.experts import Mixture
from flashinfer.model.heads import Heads
from flashinfer.model.observe import Observer, Seen
from flashinfer.model.rows import Rows
from flashinfer.model.scoring import scoring_of
from flashinfer.model.weights import Need, Weights, decode_tiles, prefill_tiles
from flashinfer.predict import Guess, Matrices, Predictor, Selection, Span, build_predictor, select
from flashinfer.store.facts import Facts

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def _soften(logits: Floats, cap: float) -> Floats:
    """`cap * tanh(logits / cap)` (Gemma 2, arXiv 2408.00118, section 2). Overwrites and returns `logits`."""
    np.tanh(np.divide(logits, np.float32(cap), out=logits), out=logits)
    return np.multiply(logits, np.float32(cap), out=logits)


class Decoder:
    """Runs tokens through the layers. Holds no per-session state.

    choice: the predictor. adapter: what is added to products. observer: looks on, where it is set.
    """

    def __init__(
        self,
        facts: Facts,
        weights: Weights,
        context: int,
        *,
        window: int,
        choice: Choice | None = None,
        ledger: Ledger | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.facts, self.weights, self.backend = facts, weights, weights.backend
        self._adapter = adapter or Adapter(weights.backend)
        self._span = (ledger or Ledger()).span
        self._window = window
        self._bundles = [weights.bundle(i) for i in range(facts.num_layers)]
        self.observer: Observer | None = None
        choice = choice or Choice()
        matrices = self._matrices()
        self._predictor = self._build(choice, matrices)
        self._mixture = None if facts.experts is None else Mixture(
            facts, weights, matrices, choice.experts or facts.experts.per_token, window, everything=choice.kind == "all"
        )  # fmt: skip
        self._heads = Heads(facts, weights, context)
        self._scoring = [scoring_of(facts, i, self._host(f"layers.{i}.attn.sinks")) for i in range(facts.num_layers)]

    def _host(self, role: str) -> Floats | None:
        found = self.weights.vector(role)
        return None if found is None else self.backend.fetch(found)

    def _matrices(self) -> Matrices:
        return Matrices(self.backend, self._product, self._linear, self.weights.vector)

    def _build(self, choice: Choice, matrices: Matrices) -> Predictor:
        separate = [bundle.decision is None for bundle in self._bundles]
        return build_predictor(choice, self.facts, separate, matrices)

    def new_kv(self, capacity: int, kv_type: KvType) -> list[Buffer]:
        """Empty keys and values for every layer."""
        f = self.facts
        return [
            self.backend.new_kv(f.num_kv_heads, f.head_dim, capacity, kv_type, f.value_dim) for _ in range(f.num_layers)
        ]

    def forward(self, tokens: Index, rows: Rows, kv: list[Buffer]) -> Buffer:
        """Hidden states `[rows.total, hidden]` after the last layer. Writes `kv` at the rows' positions."""
        with self._span("embedding"):
            x = self._embed(tokens, rows)
        run = self._side_by_side if self.facts.parallel else self._in_turn
        for layer in range(self.facts.num_layers):
            x = run(layer, x, rows, kv[layer])
        return x

    def head(self, x: Buffer) -> Floats:
        """Logits `[tokens, vocab]` of hidden states, on the host."""
        with self._span("head"):
            if self.facts.final_norm:
                x = self._norm(x, "final_norm")
            if self.weights.has("project_out.weight"):
                x = self._linear("project_out", x)
            logits = self.backend.fetch(self._linear("embed" if self.facts.tied_head else "head", x))
            np.multiply(logits, np.float32(self.facts.logit_scale), out=logits)
            return logits if self.facts.logit_softcap is None else _soften(logits, self.facts.logit_softcap)

    # -- parts

    def _embed(self, tokens: Index, rows: Rows) -> Buffer:
        padded = np.zeros((rows.total, self.facts.embed_size), dtype=np.float32)
        found = self.weights.lookup("embed.weight", tokens)
        padded[rows.skip : rows.skip + rows.count] = found * np.float32(self.facts.embed_scale)
        x = self.backend.place(padded)
        if self.weights.has("project_in.weight"):
            x = self._linear("project_in", x)
        if self.weights.has("embed.positions"):
            at = np.arange(rows.start, rows.end) + self.facts.position_offset
            learned = np.zeros((rows.total, self.facts.hidden_size), dtype=np.float32)
            learned[rows.skip : rows.skip + rows.count] = self.weights.lookup("embed.positions", at)
            x = self.backend.add(x, self.backend.place(learned))
        return self._norm(x, "embed.norm") if self.facts.embed_norm else x

    def _in_turn(self, layer: int, x: Buffer, rows: Rows, kv: Buffer) -> Buffer:
        """A layer whose FFN takes what attention has been added to."""
        with self._span("attention", layer):
            x = self._block(x, f"layers.{layer}.attn", partial(self._attention, layer, rows=rows, kv=kv))
        with self._span("ffn", layer):
            return self._block(x, f"layers.{layer}.ffn", partial(self._fed, layer, residual=x, rows=rows))

    def _side_by_side(self, layer: int, x: Buffer, rows: Rows, kv: Buffer) -> Buffer:
        """A layer whose FFN takes what attention takes (GPT-J): who fires is known before attention is computed."""
        with self._span("attention", layer):
            attended = self._branch(x, f"layers.{layer}.attn", partial(self._attention, layer, rows=rows, kv=kv))
        with self._span("ffn", layer):
            fed = self._branch(x, f"layers.{layer}.ffn", partial(self._fed, layer, residual=x, rows=rows))
        return self.backend.add(self.backend.add(x, attended), fed)

    def _block(self, x: Buffer, name: str, part: Callable[[Buffer], Buffer]) -> Buffer:
        """A residual block; OPT-350m norms its sum."""
        x = self.backend.add(x, self._branch(x, name, part))
        return self._norm(x, f"{name}.norm") if self.facts.norm_position == "post" else x

    def _branch(self, x: Buffer, name: str, part: Callable[[Buffer], Buffer]) -> Buffer:
        """What a block adds to `x`: normed before (almost everyone), after (OLMo 2) or both (Gemma 2)."""
        f = self.facts
        y = part(self._norm(x, f"{name}.norm") if f.norms_inputs else x)
        if f.norm_position in ("output", "both"):
            y = self._norm(y, f"{name}.norm" if f.norm_position == "output" else f"{name}.output_norm")
        return y if f.residual_scale == 1.0 else self.backend.multiply(y, f.residual_scale)

    def _norm(self, x: Buffer, name: str) -> Buffer:
        weight, bias = self.weights.vector(f"{name}.weight"), self.weights.vector(f"{name}.bias")
        return self.backend.norm(x, weight, bias, self.facts.norm, self.facts.norm_eps)

    def _product(self, role: str, x: Buffer) -> Buffer:
        out = self.backend.empty(len(x), self.weights.rows_of(role))
        for first, block in self.weights.blocks(role):
            assert first % TILE_ROWS == 0
            self.backend.linear(out, first, x, block)
        return out

    def _linear(self, name: str, x: Buffer) -> Buffer:
        out = self._product(f"{name}.weight", x)
        bias = self.weights.vector(f"{name}.bias")
        return self._adapter.add(out if bias is None else self.backend.add(out, bias), f"{name}.weight", x)

    def _attention(self, layer: int, x: Buffer, rows: Rows, kv: Buffer) -> Buffer:
        f, name = self.facts, f"layers.{layer}.attn"
        if f.latent is None:
            q, k, v = (self._linear(f"{name}.{part}", x) for part in "qkv")
            q, k = self._heads.prepare(layer, "q", q, rows), self._heads.prepare(layer, "k", k, rows)
        else:
            q, k, v = self._decompressed(layer, x, rows)
        self.backend.append_kv(kv, rows.start, k, v, rows.skip, rows.count)
        return self._linear(f"{name}.o", self.backend.attend(q, kv, rows.first, f.num_heads, self._scoring[layer]))

    def _decompressed(self, layer: int, x: Buffer, rows: Rows) -> tuple[Buffer, Buffer, Buffer]:
        """Queries, keys and values of latent attention (see `facts.Latent`), for all heads in full."""
        name = f"layers.{layer}.attn"
        if self.weights.has(f"{name}.q_a.weight"):
            q = self._linear(f"{name}.q_b", self._norm(self._linear(f"{name}.q_a", x), f"{name}.q_a_norm"))
        else:
            q = self._linear(f"{name}.q", x)
        latent = self._norm(self._linear(f"{name}.kv_a", x), f"{name}.kv_a_norm")
        turned = self._heads.turn(layer, self._linear(f"{name}.k_rope", x), rows, shared=True)
        k = self.backend.share(self._linear(f"{name}.k_b", latent), turned, self.facts.num_heads)
        return self._heads.prepare(layer, "q", q, rows), k, self._linear(f"{name}.v_b", latent)

    def _fed(self, layer: int, x: Buffer, residual: Buffer, rows: Rows) -> Buffer:
        """The feed-forward part, whichever it is."""
        if self._mixture is None or self.facts.routed(layer) is None:
            return self._ffn(layer, x, residual, rows)
        shares = self._mixture.shares(layer, x, rows)
        guess = partial(self._next, layer + 1, residual, rows)
        if self.observer is not None:
            inputs = self.backend.products(x, rows.skip, rows.count)
            active = self._mixture.active(layer, shares)
            self.observer.seen(layer, Seen(inputs, inputs[:, :0], active, active))
        return self._mixture.run(layer, x, shares, rows, self._bundles[layer], guess)

    def _ffn(self, layer: int, x: Buffer, residual: Buffer, rows: Rows) -> Buffer:
        f, backend, bundle = self.facts, self.backend, self._bundles[layer]
        guess = self._predictor.guess(layer, x, Span(rows.skip, rows.count))
        if guess.gate is None:  # what comes with the bundles is added to it
            gate = self._adapter.start(f"layers.{layer}.ffn.{f.decision}.weight", x, f.intermediate_size)
        else:
            gate = guess.gate
            self._limit(gate, guess, rows)
        feed = self._adapter.feed(layer, bundle, x, f.intermediate_size)
        need = self._need(guess, rows.total == 1)
        for group in self.weights.neurons(layer, need, partial(self._next, layer + 1, residual, rows)):
            if guess.gate is None:
                backend.decide(gate, x, group.index, group.memory, group.offsets, bundle)
                self._limit(gate, guess, rows)
            feed.take(backend.fire(gate, f.activation, group.index, f.fires_above), group)
        if self.observer is not None:
            self.observer.seen(layer, self._seen(x, gate, guess, rows))
        out, bias = feed.result(), self.weights.vector(f"layers.{layer}.ffn.down.bias")
        return out if bias is None else backend.add(out, bias)

    def _need(self, guess: Guess, decode: bool) -> Need:
        neurons = self.facts.intermediate_size

        def found() -> tuple[Selection, Index]:
            mask = None if guess.needed is None else self.backend.marks(guess.needed)
            selection = select(mask, neurons, self._window)
            tiles = decode_tiles(selection.needed) if decode else prefill_tiles(selection.needed, neurons)
            return selection, tiles

        return Need(found, guess.needed if decode else None)

    def _next(self, layer: int, residual: Buffer, rows: Rows) -> Need | None:
        """Whom the next layer will probably need: its predictor on what is known before this layer's output."""
        if rows.total > 1 or layer >= self.facts.num_layers or not self.weights.looks_ahead:
            return None
        x = self._norm(residual, f"layers.{layer}.ffn.norm") if self.facts.norms_inputs else residual
        if self._mixture is not None:
            return self._mixture.expected(layer, x)
        guess = self._predictor.guess(layer, x, Span(0, 1))
        return None if guess.needed is None else self._need(guess, decode=True)

    def _limit(self, gate: Buffer, guess: Guess, rows: Rows) -> None:
        """Take out who was read for another token of the step only. In decode nobody is, but of a known product."""
        if guess.final and guess.needed is not None and (rows.total > 1 or guess.gate is not None):
            self.backend.limit(gate, rows.skip, guess.needed)

    def _seen(self, x: Buffer, gate: Buffer, guess: Guess, rows: Rows) -> Seen:
        inputs, products = (self.backend.products(y, rows.skip, rows.count) for y in (x, gate))
        needed = None if guess.needed is None else self.backend.marks(guess.needed)
        if self.facts.sparse:
            return Seen(inputs, products, products > np.float32(self.facts.fires_above), needed)
        active = np.ones(products.shape, dtype=bool) if needed is None else needed
        return Seen(inputs, products, active, needed)
