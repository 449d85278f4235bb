"""Facts that came later: left out where they say nothing new, held to what is possible."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.errors import StoreError
from flashinfer.store import Experts, Facts
from flashinfer.store.check_facts import check_facts
from flashinfer.store.facts import LATER_FACTS, Latent, Rope, facts_table

ROPE = Rope(theta=10000.0, rotary_dim=4)
FACTS = Facts(
    family="llama", vocab_size=20, hidden_size=16, embed_size=16, intermediate_size=21, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, context_length=32, norm="rms", norm_eps=1e-6, norm_position="pre", activation="relu",
    gated=True, tied_head=False, rope=ROPE,
)  # fmt: skip
LATENT = Latent(kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
WITH_LATENT: dict[str, Any] = {"latent": LATENT, "head_dim": 10, "num_kv_heads": 4}
EXPERTS = Experts(8, 2, 21, shared_size=5, shared_gate=True, groups=4, top_groups=2, dense=(1,))
CHANGES: dict[str, Any] = {
    "parallel": True, "qk_norm": "heads", "embed_scale": 12.0, "residual_scale": 0.22, "logit_scale": 0.5,
    "attention_scale": 0.1, "window": 64, "global_layers": (1,), "local_rope": Rope(theta=100.0, rotary_dim=4),
    "attention_softcap": 50.0, "logit_softcap": 30.0, "fires_above": 0.01, "alibi": 8.0, "alibi_scaled": True,
    "embed_norm": True, "turned_first": True, "sinks": True, "experts": EXPERTS,
    "latent": LATENT,
}  # fmt: skip
ROPE_CHANGES: dict[str, Any] = {
    "attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "short_factor": (1.0, 1.0),
    "long_factor": (2.0, 3.0), "skipped": (1,), "reversed": True,
}  # fmt: skip


def need(condition: bool, what: str) -> None:
    if not condition:
        raise StoreError(what)


def test_a_model_that_needs_none_is_written_as_before() -> None:
    table = facts_table(FACTS)
    assert not LATER_FACTS & (set(table) | set(table["rope"]))
    assert list(table)[-4:] == ["rope", "position_offset", "final_norm", "norm_affine"]


def test_every_later_fact_is_one() -> None:
    assert set(CHANGES) | set(ROPE_CHANGES) == LATER_FACTS


@given(st.sets(st.sampled_from(sorted(CHANGES))), st.sets(st.sampled_from(sorted(ROPE_CHANGES))))
def test_what_is_written_is_read(changed: set[str], turned: set[str]) -> None:
    rope = msgspec.structs.replace(ROPE, **{name: ROPE_CHANGES[name] for name in turned})
    facts = msgspec.structs.replace(FACTS, rope=rope, **{name: CHANGES[name] for name in changed})
    table = facts_table(facts)
    assert LATER_FACTS & (set(table) | set(table["rope"])) == changed | turned
    assert msgspec.json.decode(msgspec.json.encode(table), type=Facts) == facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": True, "norm_position": "post"}, "side by side"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"attention_scale": float("inf")}, "attention_scale is inf"),
        ({"embed_scale": float("nan")}, "embed_scale is nan"),
        ({"window": 0}, "window is 0, a positive number"),
        ({"global_layers": (0,)}, "global layers without a window"),
        ({"window": 8, "global_layers": (2,)}, "a global layer that is not there"),
        ({"local_rope": ROPE}, "local rope without a window"),
        ({"window": 8, "local_rope": Rope(theta=1.0, rotary_dim=3)}, "rotary_dim 3"),
        ({"fires_above": 0.5}, "a threshold of 0.5 for relu"),
        ({"fires_above": -0.5, "activation": "fatrelu"}, "a threshold of -0.5 for fatrelu"),
        ({"fires_above": float("nan"), "activation": "shifted_relu"}, "a threshold of nan"),
        ({"activation": "drelu", "gated": False}, "drelu in a plain"),
        ({"alibi": 8.0}, "alibi 8.0, or with rotary"),
        ({"alibi_scaled": True}, "alibi_scaled without alibi"),
        ({"attention_softcap": 0.0}, "attention_softcap is 0.0"),
        ({"logit_softcap": float("nan")}, "logit_softcap is nan"),
        ({"rope": {"skipped": (2,)}}, "a layer that is not there"),
        ({"rope": {"attention_factor": 0.0}}, "attention_factor"),
        ({"experts": Experts(0, 1, 4)}, "0 experts of 4 neurons"),
        ({"experts": Experts(4, 1, 0)}, "4 experts of 0 neurons"),
        ({"experts": Experts(4, 5, 4)}, "5 experts a token, of 4"),
        ({"experts": Experts(4, 0, 4)}, "0 experts a token"),
        ({"experts": Experts(6, 1, 4, groups=4)}, "6 experts in 4 groups"),
        ({"experts": Experts(8, 5, 4, groups=4, top_groups=2)}, "5 experts a token, of 4"),
        ({"experts": Experts(8, 1, 4, groups=2, top_groups=3)}, "3 of 2 groups"),
        ({"experts": Experts(4, 1, 4, scoring="sigmoid", groups=4, top_groups=2)}, "groups of one expert"),
        ({"experts": Experts(4, 1, 4, scale=float("inf"))}, "expert scale"),
        ({"experts": Experts(4, 1, 4, shared_gate=True)}, "none of them"),
        ({"experts": Experts(4, 1, 4, dense=(2,))}, "dense layer among experts"),
        ({"activation": "swiglu_oai", "gated": False}, "swiglu_oai in a plain"),
        ({"latent": Latent(8, 4, 0, 4)}, "positive numbers were expected"),
        ({"latent": Latent(8, 4, 4, 4, q_rank=0)}, "positive numbers were expected"),
        ({"latent": LATENT}, "heads of 4 for latent"),
        (WITH_LATENT | {"rope": {"rotary_dim": 2}}, "turns what its heads share"),
        (WITH_LATENT | {"rope": {"skipped": (0,)}}, "turns what its heads share"),
        (WITH_LATENT | {"num_kv_heads": 2}, "latent attention with groups"),
        (WITH_LATENT | {"qk_norm": "head"}, "latent attention with groups"),
        ({"rope": {"scaling": "yarn"}}, "impossible ramp"),
        ({"rope": {"scaling": "yarn", "original_context": 8, "beta_slow": 40.0}}, "impossible ramp"),
        ({"rope": {"scaling": "longrope", "original_context": 8}}, "impossible factors"),
        ({"rope": {"scaling": "longrope", "original_context": 8, "short_factor": (1.0, 0.0),
                   "long_factor": (1.0, 1.0)}}, "impossible factors"),
    ],
)  # fmt: skip
def test_what_cannot_be(change: dict[str, Any], message: str) -> None:
    rope = msgspec.structs.replace(ROPE, **change.get("rope", {}))
    with pytest.raises(StoreError, match=message):
        check_facts(msgspec.structs.replace(FACTS, **(change | {"rope": rope})), need)


def test_neurons_of_a_layer() -> None:
    facts = msgspec.structs.replace(FACTS, experts=EXPERTS)
    assert [facts.neurons(i) for i in range(2)] == [8 * 21 + 5, 21]
    assert facts.routed(0) == EXPERTS
    assert facts.routed(1) is None
