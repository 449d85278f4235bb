"""The roles a tensor can play, with their shapes, in the order in which a token uses them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from flashinfer.quant import codec_named
from flashinfer.store.facts import Facts, Latent
from flashinfer.store.manifest import Manifest

Shape = tuple[int, ...]

RANK_UNIT = 32
"""The rank of low-rank factors is a multiple of this."""
PREDICTOR_PARTS = (
    "lowrank.a.weight",
    "lowrank.b.weight",
    "lowrank.b.bias",
    "sketch.weight",
    "sketch.slack",
    "sketch.bias",
    "threshold",
)
"""What predictors may add to a layer, in the order of use; `docs/format.md` has their shapes."""
PREDICTORS = {"certified": "sketch", "low-rank": "lowrank", "threshold": "threshold"}
"""By predictor, what its parts begin with."""
_INPUTS = {"attn.q": "attn", "attn.k": "attn", "attn.v": "attn", "attn.o": "attn.o", "ffn.gate": "ffn", "ffn.up": "ffn"}
"""By matrix, the input it shares."""
_MULTIPLIED = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _INPUTS))})\.weight")
_PREDICTOR = re.compile(r"layers\.\d+\.ffn\.(lowrank|sketch|threshold)(\..*)?")


def order_role(layer: int) -> str:
    """Name of the dense tensor that holds the neuron permutation of a layer."""
    return f"layers.{layer}.ffn.order"


def ffn_role(layer: int, part: str) -> str:
    """Name of an FFN tensor: `part` is `gate.weight`, `up.bias`, `down.weight`, ..."""
    return f"layers.{layer}.ffn.{part}"


def lowrank_role(layer: int, part: str) -> str:
    """Name of a low-rank factor: `part` is `a.weight` `[rank, hidden]`, `b.weight` `[neurons, rank]` or `b.bias`."""
    return ffn_role(layer, f"lowrank.{part}")


def sketch_role(layer: int, part: str) -> str:
    """Name of a part of the decision matrix's sketch: `weight` `[neurons, hidden]`, `slack` or `bias` `[neurons]`."""
    return ffn_role(layer, f"sketch.{part}")


def sketch_codec(decision: str) -> str:
    """The codec of the sketch of a decision matrix that comes in that codec: int8g32, or its own where that is less."""
    return min("int8g32", decision, key=lambda name: codec_named(name).row_bytes(4096))


def threshold_role(layer: int) -> str:
    """Name of a layer's thresholds, `[neurons]`."""
    return ffn_role(layer, "threshold")


def outliers_role(role: str) -> str | None:
    """Name of the tensor of the outlier columns that an `llm.int8` matrix of that role has; matrices of the same input
    share it. None where a matrix can have none."""
    match = _MULTIPLIED.fullmatch(role)
    if match is None:
        return None
    layer, part = match.groups()
    return f"layers.{layer}.{_INPUTS[part]}.outliers"


def is_outliers(role: str) -> bool:
    """Whether a tensor of that role names outlier columns."""
    return role.endswith(".outliers")


def is_predictor(role: str) -> bool:
    """Whether a tensor of that role belongs to a predictor: it lies in the predictors file, never in the dense one."""
    return predictor_of(role) is not None


def predictor_of(role: str) -> str | None:
    """The predictor a tensor of that role belongs to, None where it is the model's own."""
    match = _PREDICTOR.fullmatch(role)
    return None if match is None else next(name for name, part in PREDICTORS.items() if part == match[1])


def predictor_shapes(facts: Facts, layer: int, rank: int) -> dict[str, Shape]:
    """Shape of every role predictors may add to a layer, in the order of use; `rank` is that of the low-rank factors.

    None is a role of a checkpoint, so `role_shapes` has none of them.
    """
    hidden, neurons = facts.hidden_size, facts.neurons(layer)
    matrices = {"lowrank.a.weight": (rank, hidden), "lowrank.b.weight": (neurons, rank),
                "sketch.weight": (neurons, hidden)}  # fmt: skip
    return {ffn_role(layer, part): matrices.get(part, (neurons,)) for part in PREDICTOR_PARTS}


def use_order(manifest: Manifest) -> list[str]:
    """All roles of `manifest.tensors` in the order in which a token uses them."""
    return [role for role in all_roles(manifest.facts) if role in manifest.tensors]


def all_roles(facts: Facts) -> Iterator[str]:
    """Every role a store of a model of these facts may have, in the order of use.

    To those of `role_shapes` it adds a layer's predictors, after the norm they share with the decision matrix, its
    permutation, which comes last of its layer, and outlier columns, before the first matrix that has them.
    """
    norms = {f"layers.{i}.ffn.norm.bias": i for i in range(facts.num_layers)}
    ends = {ffn_role(i, "down.bias"): i for i in range(facts.num_layers)}
    before = ""
    for role in role_shapes(facts):
        outliers = outliers_role(role)
        if outliers is not None and outliers != before:
            yield (before := outliers)
        yield role
        if role in norms:
            yield from predictor_shapes(facts, norms[role], RANK_UNIT)
        if role in ends:
            yield order_role(ends[role])


def role_shapes(facts: Facts) -> dict[str, Shape]:
    """Shape of every role a model of these facts may have, required or not, in the order of use.

    Weights are `[out, in]`. The permutation (`order_role`) is not among them: no checkpoint has it.
    """
    hidden, embed = facts.hidden_size, facts.embed_size
    shapes: dict[str, Shape] = {"embed.weight": (facts.vocab_size, embed)}
    if facts.learned_positions:
        shapes["embed.positions"] = (facts.context_length + facts.position_offset, hidden)
    if embed != hidden:
        shapes["project_in.weight"] = (hidden, embed)
    if facts.embed_norm:
        shapes |= {"embed.norm.weight": (hidden,), "embed.norm.bias": (hidden,)}
    for i in range(facts.num_layers):
        shapes |= {f"layers.{i}.{role}": shape for role, shape in _layer_shapes(facts, i).items()}
    shapes |= {"final_norm.weight": (hidden,), "final_norm.bias": (hidden,)}
    if embed != hidden:
        shapes["project_out.weight"] = (embed, hidden)
    if not facts.tied_head:
        shapes |= {"head.weight": (facts.vocab_size, embed), "head.bias": (facts.vocab_size,)}
    return shapes


def _layer_shapes(facts: Facts, layer: int) -> dict[str, Shape]:
    hidden, neurons = facts.hidden_size, facts.neurons(layer)
    shapes: dict[str, Shape] = {"attn.norm.weight": (hidden,), "attn.norm.bias": (hidden,)}
    shapes |= _plain_shapes(facts) if facts.latent is None else _latent_shapes(facts, facts.latent)
    shapes |= {"attn.sinks": (facts.num_heads,)} if facts.sinks else {}
    shapes |= _linear_shapes("attn.o", hidden, facts.num_heads * facts.value_dim)
    shapes |= _output_norm_shapes(facts, "attn")
    shapes |= {"ffn.norm.weight": (hidden,), "ffn.norm.bias": (hidden,)}
    shapes |= _router_shapes(facts, layer)
    for name in ("gate", "up") if facts.gated else ("up",):
        shapes |= {f"ffn.{name}.weight": (neurons, hidden), f"ffn.{name}.bias": (neurons,)}
    shapes |= {"ffn.down.weight": (hidden, neurons), "ffn.down.bias": (hidden,)}
    return shapes | _output_norm_shapes(facts, "ffn")


def _linear_shapes(name: str, out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _plain_shapes(facts: Facts) -> dict[str, Shape]:
    """Queries, keys and values from the layer's input, and their norms."""
    hidden, kv = facts.hidden_size, facts.num_kv_heads * facts.head_dim
    shapes = _linear_shapes("attn.q", facts.num_heads * facts.head_dim, hidden)
    for name in "kv":
        shapes |= _linear_shapes(f"attn.{name}", kv, hidden)
    return shapes | _qk_norm_shapes(facts)


def _latent_shapes(facts: Facts, latent: Latent) -> dict[str, Shape]:
    """Queries, keys and values by way of narrower vectors."""
    hidden, heads = facts.hidden_size, facts.num_heads
    if latent.q_rank is None:
        shapes = _linear_shapes("attn.q", heads * facts.head_dim, hidden)
    else:
        shapes = _linear_shapes("attn.q_a", latent.q_rank, hidden) | {"attn.q_a_norm.weight": (latent.q_rank,)}
        shapes["attn.q_b.weight"] = (heads * facts.head_dim, latent.q_rank)
    shapes |= _linear_shapes("attn.kv_a", latent.kv_rank, hidden) | {"attn.kv_a_norm.weight": (latent.kv_rank,)}
    shapes |= _linear_shapes("attn.k_rope", latent.rope_dim, hidden)
    shapes["attn.k_b.weight"] = (heads * latent.nope_dim, latent.kv_rank)
    shapes["attn.v_b.weight"] = (heads * latent.value_dim, latent.kv_rank)
    return shapes


def _output_norm_shapes(facts: Facts, block: str) -> dict[str, Shape]:
    """The norm of what a block adds, where its input has one, too."""
    if facts.norm_position != "both":
        return {}
    return {f"{block}.output_norm.{kind}": (facts.hidden_size,) for kind in ("weight", "bias")}


def _router_shapes(facts: Facts, layer: int) -> dict[str, Shape]:
    """Of a layer of experts: what chooses them, what weighs the shared ones, and what each adds by itself."""
    experts = facts.routed(layer)
    if experts is None:
        return {}
    shapes: dict[str, Shape] = {"ffn.router.weight": (experts.count, facts.hidden_size)}
    shapes["ffn.router.bias"] = (experts.count,)
    if experts.scoring == "sigmoid":
        shapes["ffn.router.correction"] = (experts.count,)
    if experts.shared_gate:
        shapes["ffn.shared_gate.weight"] = (1, facts.hidden_size)
    shapes["ffn.expert_bias.weight"] = (facts.hidden_size, experts.count)
    return shapes


def _qk_norm_shapes(facts: Facts) -> dict[str, Shape]:
    """Weights and biases of the norms of queries and keys: of one head, or of all."""
    if facts.qk_norm == "none":
        return {}
    heads = {"q": facts.num_heads, "k": facts.num_kv_heads}
    sizes = {name: facts.head_dim * (1 if facts.qk_norm == "head" else n) for name, n in heads.items()}
    return {f"attn.{n}_norm.{kind}": (size,) for n, size in sizes.items() for kind in ("weight", "bias")}


def is_required(role: str, facts: Facts) -> bool:
    """Whether a model of these facts, whose `role_shapes` name this role, must have it: all but biases."""
    if role.endswith("norm.weight"):
        return facts.norm_affine and (facts.final_norm or not role.startswith("final_norm."))
    return not role.endswith((".bias", ".expert_bias.weight"))


def bundle_parts(facts: Facts, decision: str, biases: frozenset[str] | set[str]) -> tuple[str, ...]:
    """Parts of a bundle in their order on disk, as `docs/format.md` sets it.

    `decision` is `separate` or `bundled`; `biases` are those the layer has, of `gate.bias` and `up.bias`.
    """
    matrices = [m for m in ("gate", "up") if (m == "up" or facts.gated)]
    inside = [m for m in matrices if decision == "bundled" or m != facts.decision]
    weights = [f"{m}.weight" for m in inside]
    return (*weights, "down.weight", *(f"{m}.bias" for m in inside if f"{m}.bias" in biases))
