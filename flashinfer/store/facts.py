"""What a decoder must know about a model beside its weights: plain facts, declared in the manifest."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Activation = Literal[
    "relu", "relu2", "silu", "gelu", "gelu_tanh", "gelu_quick", "fatrelu", "shifted_relu", "drelu", "swiglu_oai"
]  # fmt: skip
"""Of the decision product x, with `Facts.fires_above` t: `fatrelu` is x where x > t, else 0 (ProSparse, arXiv
2402.13516, section 3.3); `shifted_relu` is relu(x - t) (arXiv 2310.04564, section 5.3); `drelu` is relu of gate and of
up (TurboSparse, arXiv 2406.05955, section 3.2); `gelu_tanh` and `gelu_quick` are what transformers calls them, too.
`swiglu_oai` is gpt-oss's clamped SwiGLU (arXiv 2508.10925, section 2.3; the name is ggml's): x * sigmoid(1.702 x) of
gate, cut off above 7, times up, cut off beyond 7 on both sides, plus one."""

UpActivation = Literal["relu", "clamped"]
"""What becomes of products with `up` of a gated layer, where they do not count as they are; `clamped` is their part of
`swiglu_oai`."""
_UP_ACTIVATIONS: dict[str, UpActivation] = {"drelu": "relu", "swiglu_oai": "clamped"}

SPARSE_ACTIVATIONS: frozenset[str] = frozenset({"relu", "relu2", "fatrelu", "shifted_relu", "drelu"})
"""Activations that are exactly zero where the decision product does not exceed `Facts.fires_above`."""


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary positions (arXiv 2104.09864), halves convention of transformers' llama.

    `model/rotary.py` has the scalings. `attention_factor` multiplies cosines and sines; `beta_fast`, `beta_slow` and
    `truncate` are YaRN's, the two lists of factors (one for each pair) LongRoPE's. In layers `skipped` nothing is
    turned. `reversed`: pairs are turned the other way (nanochat).
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()
    reversed: bool = False


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Feed-forward layers made of experts, some of which a router chooses for each token (arXiv 1701.06538).

    count: routed experts of a layer. per_token: how many of them a token gets. size: neurons of one. shared_size:
    neurons behind all of theirs that every token gets, weighed by a sigmoid of their own where there is a
    `shared_gate`.
    scoring: the router's products are scored by a softmax over all experts, or each by the sigmoid, and then chosen
    by score and correction (arXiv 2412.19437, section 2.1.2). normalised: the scores of the chosen are made to sum to
    one, which makes a softmax one over the chosen only. scale: multiplies them at the end.
    groups: experts come in so many groups, and a token's are of its best `top_groups` (arXiv 2405.04434, section
    2.2.2); a group counts as its best expert (softmax), or its two best (sigmoid).
    dense: layers without experts.
    """

    count: int
    per_token: int
    size: int
    shared_size: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    dense: tuple[int, ...] = ()

    @property
    def neurons(self) -> int:
        """Neurons of a layer of experts: one expert's after the other's, then the shared ones."""
        return self.count * self.size + self.shared_size

    @property
    def columns(self) -> int:
        """Experts that can be weighed: the shared neurons count as one more."""
        return self.count + (self.shared_size > 0)


class Latent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads come from
    one vector of `kv_rank` values, queries from one of `q_rank` (None: from the layer's input).

    A head's queries and keys are `rope_dim` values that are turned, which for keys all heads share, and `nope_dim`
    that are not; its values are `value_dim`.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and arithmetic of a decoder. Sizes are counts of values.

    `norm_position`: the input of a block is normed (`pre`), its sum with the residual (`post`), what it adds to the
    residual (`output`), or input and addition, each with weights of its own (`both`).
    `parallel`: attention and FFN both take the layer's input, and both are added to it.
    `qk_norm`: queries and keys are normed over each head, with the same weights for all heads (`head`) or weights for
    each (`heads`), or over their whole width (`width`). `turned_first`: after they got their rotary positions, not
    before (nanochat).
    `position_offset` is added to a position before it indexes the learned table (OPT: 2).
    `final_norm`: whether the last layer's output is normed (not in post-norm models). `norm_affine`: whether
    norms have weights.
    `embed_size` differs from `hidden_size` where the family projects in and out (OPT-350m).
    `embed_scale` multiplies embeddings, `residual_scale` what a block adds, `logit_scale` logits, `attention_scale` the
    products of queries and keys (None: `head_dim ** -0.5`).
    `window`: so many positions a query sees, its own the last of them; in layers `global_layers` it sees all.
    `local_rope`: turns queries and keys of the layers that have a window, where that differs from `rope`.
    `attention_softcap`, `logit_softcap`: a score, a logit s becomes `cap * tanh(s / cap)`.
    `alibi`: the largest exponent of ALiBi's slopes (8 in the paper; 0: it has none); `alibi_scaled`: biases are added
    to products before those are scaled (Falcon).
    `sinks`: each head has a score that counts in the softmax and no value.
    `embed_norm`: what comes into the first layer is normed (BLOOM).
    `fires_above`: a neuron with a sparse activation fires where its decision product exceeds it.
    `experts`: of a mixture of experts; `intermediate_size` is then that of its dense layers.
    `latent`: of multi-head latent attention; `head_dim` is then that of queries and keys.
    """

    family: str
    vocab_size: int
    hidden_size: int
    embed_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_position: Literal["pre", "post", "output", "both"]
    activation: Activation
    gated: bool
    tied_head: bool
    rope: Rope | None = None
    position_offset: int = 0
    final_norm: bool = True
    norm_affine: bool = True
    parallel: bool = False
    qk_norm: Literal["none", "head", "heads", "width"] = "none"
    turned_first: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    window: int | None = None
    global_layers: tuple[int, ...] = ()
    local_rope: Rope | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    fires_above: float = 0.0
    alibi: float = 0.0
    alibi_scaled: bool = False
    embed_norm: bool = False
    sinks: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def value_dim(self) -> int:
        """Values of a head, of `v` and of attention's output."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def window_of(self, layer: int) -> int | None:
        """How many positions attention sees in a layer; None: all."""
        return None if layer in self.global_layers else self.window

    def rope_of(self, layer: int) -> Rope | None:
        """What turns queries and keys in a layer; None: nothing."""
        rope = self.rope if self.local_rope is None or self.window_of(layer) is None else self.local_rope
        return None if rope is None or layer in rope.skipped else rope

    @property
    def learned_positions(self) -> bool:
        """Whether positions come from a table of weights."""
        return self.rope is None and self.alibi == 0

    @property
    def norms_inputs(self) -> bool:
        """Whether the inputs of attention and of the FFN are normed."""
        return self.norm_position in ("pre", "both")

    @property
    def sparse(self) -> bool:
        """Whether the activation leaves neurons at exactly zero, so that they need not be read."""
        return self.activation in SPARSE_ACTIVATIONS

    def routed(self, layer: int) -> Experts | None:
        """The experts of a layer, None where it is dense."""
        return None if self.experts is None or layer in self.experts.dense else self.experts

    def neurons(self, layer: int) -> int:
        """Neurons of a layer's feed-forward part."""
        experts = self.routed(layer)
        return self.intermediate_size if experts is None else experts.neurons

    @property
    def up_activation(self) -> UpActivation | None:
        """What becomes of products with `up`; None: they count as they are."""
        return _UP_ACTIVATIONS.get(self.activation)

    @property
    def decision(self) -> Literal["gate", "up"]:
        """The FFN matrix whose product decides which neurons fire."""
        return "gate" if self.gated else "up"


LATER_FACTS: frozenset[str] = frozenset({
    "parallel", "qk_norm", "turned_first", "embed_scale", "residual_scale", "logit_scale", "attention_scale", "window",
    "global_layers", "local_rope", "attention_softcap", "logit_softcap", "fires_above",
    "alibi", "alibi_scaled", "embed_norm", "sinks", "experts", "latent",
    "attention_factor", "beta_fast", "beta_slow", "truncate", "short_factor", "long_factor", "skipped",
    "reversed",
})  # fmt: skip
"""Facts that came after the first stores: written only where they differ from their defaults."""


def facts_table(facts: Facts | Rope | Experts | Latent) -> dict[str, Any]:
    """The facts as a manifest has them, in the order of their declaration."""
    table: dict[str, Any] = {}
    for field in msgspec.structs.fields(facts):
        value = getattr(facts, field.name)
        if field.name not in LATER_FACTS or value != field.default:
            table[field.name] = facts_table(value) if isinstance(value, Rope | Experts | Latent) else value
    return table
