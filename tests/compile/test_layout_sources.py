"""What a layout can say of one config.json: powers, alternatives, tables within, ropes by layer."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flashinfer.errors import LayoutError
from flashinfer.layout import read_layout
from flashinfer.layout.read import parse_layout
from flashinfer.layout.resolve import Resolver
from flashinfer.store import Facts
from flashinfer.store.facts import Latent

LAYOUTS = Path(__file__).parents[2] / "layouts"
GEMMA3: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 8,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
MPT: dict[str, Any] = {"d_model": 48, "n_layers": 2, "n_heads": 4}
BLOOM: dict[str, Any] = {"vocab_size": 9, "n_layer": 2, "n_head": 4}
FALCON: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def facts(family: str, config: dict[str, Any]) -> Facts:
    return Resolver(read_layout(LAYOUTS / f"{family}.toml"), config).facts()


class TestTwoRopes:
    def test_as_the_release_says_it(self):
        found = facts("gemma3", GEMMA3)
        assert found.rope is not None
        assert found.local_rope is not None
        assert (found.rope.theta, found.rope.scaling, found.rope.factor) == (1e6, "linear", 8.0)
        assert (found.local_rope.theta, found.local_rope.scaling) == (1e4, "none")
        assert (found.window, found.global_layers) == (8, (5,))
        assert [found.rope_of(i) is found.rope for i in (4, 5, 6)] == [False, True, False]

    def test_as_a_later_version_says_it(self):
        kinds = ["full_attention", "sliding_attention"]
        tables = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
        config = {k: v for k, v in GEMMA3.items() if "rope" not in k} | {"rope_parameters": tables}
        found, before = (
            facts("gemma3", config | {"num_hidden_layers": 2, "layer_types": kinds}),
            facts("gemma3", GEMMA3),
        )
        assert (found.rope, found.local_rope, found.global_layers) == (before.rope, before.local_rope, (0,))

    def test_without_a_window_there_is_one(self):
        found = facts("gemma3", GEMMA3 | {"sliding_window": None})
        assert (found.window, found.local_rope) == (None, None)

    def test_a_family_with_one_refuses_two(self):
        with pytest.raises(LayoutError, match="they differ by layer"):
            facts("llama", {**GEMMA3, "vocab_size": 9, "num_attention_heads": 4, "max_position_embeddings": 64,
                            "sliding_window": None, "rope_scaling": {"full_attention": {}}})  # fmt: skip


class TestTablesWithin:
    def test_a_key_of_a_table(self):
        found = facts("mpt", MPT | {"attn_config": {"softmax_scale": 0.25, "alibi_bias_max": 16}})
        assert (found.attention_scale, found.alibi) == (0.25, 16.0)

    @pytest.mark.parametrize("said", [{}, {"attn_config": None}, {"attn_config": {"softmax_scale": None}}])
    def test_that_is_not_there(self, said):
        found = facts("mpt", MPT | said)
        assert (found.attention_scale, found.alibi, found.rope, found.learned_positions) == (None, 8.0, None, False)

    @pytest.mark.parametrize("said", [{"alibi": False}, {"clip_qkv": 6.0}, {"qk_ln": True}, {"prefix_lm": True}])
    def test_that_is_not_followed(self, said):
        with pytest.raises(LayoutError, match=rf"attn_config.{next(iter(said))} = "):
            facts("mpt", MPT | {"attn_config": said})


class TestAlternatives:
    @pytest.mark.parametrize("key", ["n_embed", "hidden_size"])
    def test_of_keys(self, key):
        assert facts("bloom", BLOOM | {key: 48}).hidden_size == 48

    def test_none_of_which_is_there(self):
        with pytest.raises(
            LayoutError, match="no 'n_embed' or 'hidden_size', which layout bloom needs for hidden_size"
        ):
            facts("bloom", BLOOM)

    @pytest.mark.parametrize(
        ("said", "kv_heads", "parallel"),
        [
            ({}, 1, True),
            ({"multi_query": False}, 4, True),
            ({"multi_query": False, "parallel_attn": False}, 4, False),
            ({"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": False}, 2, True),
            ({"new_decoder_architecture": True}, 4, True),
        ],
    )
    def test_of_sources(self, said, kv_heads, parallel):
        found = facts("falcon", FALCON | said)
        assert (found.num_kv_heads, found.parallel) == (kv_heads, parallel)

    def test_positions_of_a_falcon(self):
        turned, biased = facts("falcon", FALCON), facts("falcon", FALCON | {"alibi": True})
        assert (turned.rope is not None, turned.alibi, turned.alibi_scaled) == (True, 0.0, False)
        assert (biased.rope, biased.alibi, biased.alibi_scaled) == (None, 8.0, True)


class TestProducts:
    def test_minicpm(self):
        found = facts("minicpm", {"vocab_size": 9, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 40,
                                  "num_attention_heads": 4, "scale_emb": 12, "scale_depth": 1.4,
                                  "dim_model_base": 12})  # fmt: skip
        assert found.embed_scale == 12
        assert found.residual_scale == pytest.approx(1.4 / 40**0.5)
        assert found.logit_scale == pytest.approx(12 / 48)

    @pytest.mark.parametrize(("act", "found"), [("fatrelu", 0.25), ("shifted_relu", 0.25), ("relu", None)])
    def test_a_threshold_belongs_to_an_activation(self, act, found):
        config = {"vocab_size": 9, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "hidden_act": act, "hidden_act_param": 0.25}  # fmt: skip
        if found is None:
            with pytest.raises(LayoutError, match=r"a threshold of 0\.25 for relu"):
                facts("llama", config)
        else:
            assert facts("llama", config).fires_above == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["facts"].update(parallel=[]), "parallel has no source that always counts"),
        (lambda t: t["facts"].update(parallel=[{"when": ["bias"], "key": "x"}]), "no source that always counts"),
        (lambda t: t["facts"].update(parallel=[{"when": ["no"], "key": "x"}, {"key": "y"}]), "unknown condition no"),
        (lambda t: t["rope"].update(when=["no"]), "rope depends on the unknown condition no"),
        (lambda t: t.update(window={"size": {"key": "x"}, "when": ["no"]}), "window depends on the unknown"),
        (lambda t: t["facts"].update(window=8), "unknown fact window"),
        (lambda t: t["tensors"]["embed.weight"].update(when=["bias"], otherwise=[{"name": "{i}"}]), "disagree about"),
        (lambda t: t["facts"].update(norm={"key": "x", "times": {"expr": "no"}}), "names a fact that is not there"),
    ],
)  # fmt: skip
def test_what_a_layout_must_not_say(change, message):
    table = tomllib.loads((LAYOUTS / "falcon.toml").read_text())
    change(table)
    with pytest.raises(LayoutError, match=message):
        parse_layout(table, "falcon.toml")


DEEPSEEK: dict[str, Any] = {
    "vocab_size": 9, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "n_routed_experts": 8,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


class TestDeepseek:
    @pytest.mark.parametrize(("said", "rank"), [({}, 1536), ({"q_lora_rank": None}, None), ({"q_lora_rank": 8}, 8)])
    def test_queries_may_be_wide(self, said, rank):
        found = facts("deepseek_v2", DEEPSEEK | said)
        assert found.latent == Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=rank)
        assert (found.head_dim, found.value_dim) == (192, 128)

    def test_the_scaling_of_rope_scales_attention(self):
        found = facts("deepseek_v2", DEEPSEEK | {"rope_scaling": YARN})
        assert found.rope is not None
        assert found.rope.attention_factor == 1.0
        assert found.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
        assert facts("deepseek_v2", DEEPSEEK | {"rope_scaling": YARN | {"mscale_all_dim": 0}}).attention_scale is None

    @pytest.mark.parametrize("wrong", [{"factor": "x"}, {"mscale_all_dim": "1"}])
    def test_a_scaling_that_is_no_number(self, wrong):
        with pytest.raises(LayoutError, match="rope parameters"):
            facts("deepseek_v2", DEEPSEEK | {"rope_scaling": YARN | wrong})

    def test_groups_count_where_the_method_says_so(self):
        groups = {"n_group": 4, "topk_group": 2}
        greedy, limited = (
            facts("deepseek_v2", DEEPSEEK | groups | said).experts
            for said in ({}, {"topk_method": "group_limited_greedy"})
        )
        assert greedy is not None
        assert limited is not None
        assert (greedy.groups, greedy.top_groups, limited.groups, limited.top_groups) == (1, 1, 4, 2)
        assert greedy.shared_size == 2 * 1407

    @pytest.mark.parametrize(
        ("family", "said"),
        [
            ("deepseek_v2", {"norm_topk_prob": True}), ("deepseek_v2", {"topk_method": "noaux_tc"}),
            ("deepseek_v2", {"rms_norm_eps": 1e-5}), ("deepseek_v3", {"rope_interleave": False}),
            ("deepseek_v3", {"scoring_func": "softmax"}), ("gpt_oss", {"swiglu_limit": 5.0}),
        ],
    )  # fmt: skip
    def test_what_is_not_followed(self, family, said):
        with pytest.raises(LayoutError, match=f"{next(iter(said))} = .*is supported there"):
            facts(family, DEEPSEEK | said)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t["latent"].pop("kv_rank"), "latent attention lacks a fact"),
            (lambda t: t["latent"].update(rank=3), "unknown fact of latent attention rank"),
            (lambda t: t["latent"].update(kv_rank={"expr": "no"}), "names a fact that is not there"),
            (
                lambda t: t["experts"]["facts"].update(groups=[{"key": "x", "when": ["no"]}, {"key": "y"}]),
                "condition no",
            ),
            (lambda t: t["experts"]["facts"].update(groups=[]), "no source that always counts"),
            (lambda t: t["tensors"]["embed.weight"].update(turned_last=True), "heads and is not interleaved"),
        ],
    )
    def test_what_a_layout_must_not_say(self, change, message):
        table = tomllib.loads((LAYOUTS / "deepseek_v2.toml").read_text())
        change(table)
        with pytest.raises(LayoutError, match=message):
            parse_layout(table, "deepseek_v2.toml")


class TestTextModelWithinAnother:
    def test_its_table_comes_first(self):
        whole = {"text_config": GEMMA3 | {"dtype": None}, "dtype": "bfloat16", "hidden_size": 7, "rope_theta": 3.0}
        found = facts("gemma3", whole)
        assert found.hidden_size == 48
        assert found.rope == facts("gemma3", GEMMA3).rope
        assert found.embed_scale == 6.9375  # sqrt(48) in bfloat16

    def test_what_is_beside_it_counts_too(self):
        with pytest.raises(LayoutError, match="attention_bias = True"):
            facts("gemma3", {"text_config": GEMMA3, "attention_bias": True})
