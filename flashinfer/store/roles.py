"""The roles a tensor can play, with their shapes, in the order in which a token uses them. Pure."""

from __future__ import annotations

from flashinfer.store.facts import Facts

Shape = tuple[int, ...]


def order_role(layer: int) -> str:
    """Name of the dense tensor that holds the neuron permutation of a layer."""
    return f"layers.{layer}.ffn.order"


def ffn_role(layer: int, part: str) -> str:
    """Name of an FFN tensor: `part` is `gate.weight`, `up.bias`, `down.weight`, ..."""
    return f"layers.{layer}.ffn.{part}"


def role_shapes(facts: Facts) -> dict[str, Shape]:
    """Shape of every role a model of these facts may have, required or not, in the order of use.

    Weights are `[out, in]`. The permutation (`order_role`) is not among them: no checkpoint has it.
    """
    hidden, embed = facts.hidden_size, facts.embed_size
    shapes: dict[str, Shape] = {"embed.weight": (facts.vocab_size, embed)}
    if facts.rope is None:
        shapes["embed.positions"] = (facts.context_length + facts.position_offset, hidden)
    if embed != hidden:
        shapes["project_in.weight"] = (hidden, embed)
    for i in range(facts.num_layers):
        shapes |= {f"layers.{i}.{role}": shape for role, shape in _layer_shapes(facts).items()}
    shapes |= {"final_norm.weight": (hidden,), "final_norm.bias": (hidden,)}
    if embed != hidden:
        shapes["project_out.weight"] = (embed, hidden)
    if not facts.tied_head:
        shapes["head.weight"] = (facts.vocab_size, embed)
    return shapes


def _layer_shapes(facts: Facts) -> dict[str, Shape]:
    hidden, neurons = facts.hidden_size, facts.intermediate_size
    heads, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    shapes: dict[str, Shape] = {"attn.norm.weight": (hidden,), "attn.norm.bias": (hidden,)}
    for name, out, into in (("q", heads, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, heads)):
        shapes |= {f"attn.{name}.weight": (out, into), f"attn.{name}.bias": (out,)}
    shapes |= {"ffn.norm.weight": (hidden,), "ffn.norm.bias": (hidden,)}
    for name in ("gate", "up") if facts.gated else ("up",):
        shapes |= {f"ffn.{name}.weight": (neurons, hidden), f"ffn.{name}.bias": (neurons,)}
    return shapes | {"ffn.down.weight": (hidden, neurons), "ffn.down.bias": (hidden,)}


def is_required(role: str, facts: Facts) -> bool:
    """Whether a model of these facts, whose `role_shapes` name this role, must have it: all but biases."""
    if role.endswith("norm.weight"):
        return facts.norm_affine and (facts.final_norm or not role.startswith("final_norm."))
    return not role.endswith(".bias")


def bundle_parts(facts: Facts, decision: str, biases: frozenset[str] | set[str]) -> tuple[str, ...]:
    """Parts of a bundle in their order on disk, as `docs/format.md` sets it.

    `decision` is `separate` or `bundled`; `biases` are those the layer has, of `gate.bias` and `up.bias`.
    """
    matrices = [m for m in ("gate", "up") if (m == "up" or facts.gated)]
    inside = [m for m in matrices if decision == "bundled" or m != facts.decision]
    weights = [f"{m}.weight" for m in inside]
    return (*weights, "down.weight", *(f"{m}.bias" for m in inside if f"{m}.bias" in biases))
