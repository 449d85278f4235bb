"""Every invariant the facts of a model must hold, whether a layout or a manifest says them. Pure."""

from __future__ import annotations

import math
from typing import Protocol

from flashinfer.store.facts import Experts, Facts, Latent, Rope


class Need(Protocol):
    """Raises the error of who asks, saying `what`, unless the condition holds."""

    def __call__(self, condition: bool, what: str) -> None:
        """`condition` must hold."""
        ...


def check_facts(f: Facts, need: Need) -> None:
    """Hold what every model's facts must satisfy: positive sizes, heads that divide, a possible rope."""
    for name in ("vocab_size", "hidden_size", "embed_size", "intermediate_size", "num_layers", "num_heads",
                 "num_kv_heads", "head_dim", "context_length"):  # fmt: skip
        need(getattr(f, name) > 0, f"fact {name} is {getattr(f, name)}, a positive number was expected")
    need(f.num_heads % f.num_kv_heads == 0, f"{f.num_heads} heads do not share {f.num_kv_heads} kv heads evenly")
    need(f.norm_eps > 0 and f.position_offset >= 0, "fact norm_eps or position_offset is negative")
    need(not f.parallel or f.norm_position == "pre", "attention and FFN side by side have their norms before them")
    for name in ("embed_scale", "residual_scale", "logit_scale", "attention_scale"):
        scale = getattr(f, name)
        need(scale is None or 0 < abs(scale) < math.inf, f"fact {name} is {scale}, a number but 0 was expected")
    for name in ("attention_softcap", "logit_softcap"):
        cap = getattr(f, name)
        need(cap is None or 0 < cap < math.inf, f"fact {name} is {cap}, a positive number was expected")
    need(0 <= f.alibi < math.inf and not (f.alibi and f.rope), f"alibi {f.alibi}, or with rotary positions")
    need(f.alibi > 0 or not f.alibi_scaled, "alibi_scaled without alibi")
    possible = 0 <= f.fires_above < math.inf if f.activation in ("fatrelu", "shifted_relu") else f.fires_above == 0
    need(possible, f"a threshold of {f.fires_above} for {f.activation}")
    need(f.gated or f.up_activation is None, f"{f.activation} in a plain feed-forward layer")
    _check_windows(f, need)
    for rope in (f.rope, f.local_rope):
        if rope is not None:
            _check_rope(f, rope, need)
    if f.experts is not None:
        _check_expert_facts(f, f.experts, need)
    if f.latent is not None:
        _check_latent(f, f.latent, need)


def _check_windows(f: Facts, need: Need) -> None:
    need(f.window is None or f.window > 0, f"fact window is {f.window}, a positive number was expected")
    need(f.window is not None or not f.global_layers, "global layers without a window")
    need(all(0 <= i < f.num_layers for i in f.global_layers), "a global layer that is not there")
    need(
        f.local_rope is None or (f.window is not None and f.rope is not None), "local rope without a window and a rope"
    )


def _check_expert_facts(f: Facts, e: Experts, need: Need) -> None:
    need(e.count > 0 and e.size > 0 and e.shared_size >= 0, f"{e.count} experts of {e.size} neurons cannot be")
    need(0 < e.groups <= e.count and e.count % e.groups == 0, f"{e.count} experts in {e.groups} groups")
    need(0 < e.top_groups <= e.groups, f"{e.top_groups} of {e.groups} groups of experts")
    most = e.top_groups * (e.count // e.groups)
    need(0 < e.per_token <= most, f"{e.per_token} experts a token, of {most} it can have")
    need(e.top_groups == e.groups or e.scoring == "softmax" or most > e.top_groups, "groups of one expert have no two")
    need(0 < e.scale < math.inf, f"expert scale {e.scale} is not positive")
    need(not e.shared_gate or e.shared_size > 0, "a gate of shared experts, and none of them")
    need(all(0 <= i < f.num_layers for i in e.dense), "a dense layer among experts that is not there")


def _check_latent(f: Facts, latent: Latent, need: Need) -> None:
    sizes = (latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim, latent.q_rank or 1)
    need(min(sizes) > 0 and latent.q_rank != 0, f"latent attention of {latent}, positive numbers were expected")
    need(f.head_dim == latent.nope_dim + latent.rope_dim, f"heads of {f.head_dim} for latent attention of {latent}")
    turned = f.rope is not None and f.local_rope is None and f.rope.rotary_dim == latent.rope_dim and not f.rope.skipped
    need(turned, "latent attention turns what its heads share, in all layers")
    need(f.num_kv_heads == f.num_heads and f.qk_norm == "none", "latent attention with groups of heads, or their norms")


def _check_rope(f: Facts, rope: Rope, need: Need) -> None:
    turned = rope.rotary_dim
    need(0 < turned <= f.head_dim and turned % 2 == 0, f"rotary_dim {turned} for heads of {f.head_dim}")
    need(rope.theta > 0 and rope.factor > 0, "rope theta and factor must be positive")
    bands = 0 < rope.low_freq_factor < rope.high_freq_factor and rope.original_context > 0
    need(rope.scaling != "llama3" or bands, "llama3 rope scaling with impossible frequency bands")
    ramp = 0 < rope.beta_slow <= rope.beta_fast and rope.original_context > 0 and rope.theta > 1
    need(rope.scaling != "yarn" or ramp, "yarn rope scaling with an impossible ramp")
    factors = rope.short_factor + rope.long_factor
    long = len(rope.short_factor) == len(rope.long_factor) == turned // 2 and rope.original_context > 0
    need(
        rope.scaling != "longrope" or (long and all(x > 0 for x in factors)), "longrope scaling with impossible factors"
    )
    need(0 < rope.attention_factor < math.inf, "rope attention_factor must be positive")
    need(all(0 <= i < f.num_layers for i in rope.skipped), "rope skips a layer that is not there")
