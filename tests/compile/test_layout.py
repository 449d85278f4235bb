from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashinfer.layout.read as reading
from flashinfer.errors import LayoutError
from flashinfer.layout import Layout, find_layout, known_layouts, match_layout, read_layout
from flashinfer.layout.expression import parse_expression
from flashinfer.layout.read import parse_layout
from flashinfer.store.roles import role_shapes
from tests.plain_checkpoint import LLAMA, OPT, llama_shapes, opt_shapes

LAYOUTS = Path(__file__).parents[2] / "layouts"


def match(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
    return match_layout(find_layout(config, shapes), config, shapes)


def facts(**changes: Any):
    config = {k: v for k, v in {**LLAMA, **changes}.items() if v != "absent"}
    return match(config, llama_shapes({**LLAMA, **changes})).facts


class TestShipped:
    @pytest.mark.parametrize("path", sorted(LAYOUTS.glob("*.toml")), ids=lambda p: p.stem)
    def test_every_file_is_sound_and_named_after_its_family(self, path):
        assert read_layout(path).family == path.stem

    def test_each_architecture_has_one_layout(self):
        names = [a for layout in known_layouts() for a in layout.architectures]
        assert len(set(names)) == len(names)

    def test_llama(self):
        found = match(LLAMA, llama_shapes())
        assert found.facts.family == "llama"
        assert list(found.sources) == [r for r in role_shapes(found.facts) if r in found.sources]
        assert found.sources["layers.1.ffn.gate.weight"] == "model.layers.1.mlp.gate_proj.weight"
        assert (found.facts.head_dim, found.facts.num_kv_heads, found.facts.embed_size) == (4, 2, 16)

    def test_opt(self):
        found = match(OPT, opt_shapes())
        assert found.sources["final_norm.bias"] == "model.decoder.final_layer_norm.bias"
        assert (found.facts.embed_size, found.facts.position_offset, found.facts.tied_head) == (8, 2, True)
        assert found.facts.rope is None

    def test_wheel_comes_before_source(self, tmp_path, monkeypatch):
        package = tmp_path / "flashinfer"
        (package / "layout").mkdir(parents=True)
        monkeypatch.setattr(reading, "__file__", str(package / "layout" / "read.py"))
        with pytest.raises(LayoutError, match="install it again"):
            known_layouts.__wrapped__()
        text = (LAYOUTS / "opt.toml").read_text()
        for directory, family in ((tmp_path / "layouts", "source"), (package / "layouts", "wheel")):
            directory.mkdir()
            (directory / "opt.toml").write_text(text.replace('family = "opt"', f'family = "{family}"'))
            assert [layout.family for layout in known_layouts.__wrapped__()] == [family]


class TestFacts:
    def test_defaults_of_older_configs(self):
        absent = dict.fromkeys(("rope_theta", "tie_word_embeddings", "hidden_act", "rms_norm_eps"), "absent")
        f = facts(**absent)
        assert f.rope is not None
        assert (f.rope.theta, f.tied_head, f.activation, f.norm_eps) == (10000.0, False, "silu", 1e-6)

    def test_null_counts_as_absent(self):
        assert facts(head_dim=None, rope_scaling=None, sliding_window=None).head_dim == 4

    @pytest.mark.parametrize(
        ("given", "expected"),
        [("relu", "relu"), ("relu2", "relu2"), ("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"),
         ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("quick_gelu", "gelu_quick")],
    )  # fmt: skip
    def test_activation_names(self, given, expected):
        assert facts(hidden_act=given).activation == expected

    def test_every_activation_of_transformers_is_followed_or_refused(self):
        import numpy as np
        import torch
        from transformers.activations import ACT2CLS, ACT2FN

        from tests.backend.reference import activated

        x, refused = np.linspace(-6, 6, 101), set()
        for name in sorted(ACT2CLS):
            try:
                ours = activated(x, facts(hidden_act=name).activation)
            except LayoutError as e:
                assert f"hidden_act = '{name}'" in str(e)  # noqa: PT017
                refused.add(name)
                continue
            np.testing.assert_allclose(ours, ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)
        assert refused == {
            "gelu_10", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "relu6", "sigmoid",
            "sqrtsoftplus", "tanh", "xielu",
        }  # fmt: skip

    def test_opt_350m(self):
        config = {**OPT, "do_layer_norm_before": False}
        shapes = {n: s for n, s in opt_shapes().items() if not n.startswith("model.decoder.final_layer_norm")}
        found = match(config, shapes)
        assert found.facts.norm_position == "post"
        assert "final_norm.weight" not in found.sources

    def test_opt_final_norm_removed(self):
        config = {**OPT, "_remove_final_layer_norm": True}
        shapes = {n: s for n, s in opt_shapes().items() if not n.startswith("model.decoder.final_layer_norm")}
        assert "final_norm.weight" not in match(config, shapes).sources

    def test_opt_without_biases(self):
        shapes = {n: s for n, s in opt_shapes().items() if not n.endswith(".bias") or "norm" in n}
        assert "layers.0.ffn.up.bias" not in match({**OPT, "enable_bias": False}, shapes).sources


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


class TestRope:
    def test_old_style(self):
        rope = facts(rope_theta=5e5, rope_scaling=LLAMA3).rope
        assert (rope.theta, rope.scaling, rope.factor, rope.original_context, rope.rotary_dim) == (
            5e5,
            "llama3",
            8,
            16,
            4,
        )

    def test_new_style(self):
        assert (
            facts(rope_theta="absent", rope_parameters={**LLAMA3, "rope_theta": 5e5}).rope
            == facts(rope_theta=5e5, rope_scaling=LLAMA3).rope
        )

    def test_older_key_and_linear(self):
        rope = facts(rope_scaling={"type": "linear", "factor": 2}).rope
        assert (rope.scaling, rope.factor) == ("linear", 2.0)

    def test_default_type(self):
        assert facts(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}).rope == facts().rope

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            (
                {"rope_type": "mrope"},
                "rope type 'mrope'; default, linear, dynamic, llama3, yarn, longrope are supported",
            ),
            ({"rope_type": "yarn", "long_factor": [2.0]}, "type yarn with long_factor are not understood"),
            ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}, "impossible ramp"),
            ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "impossible factors"),
            ({"rope_type": "yarn", "factor": "four"}, "not understood"),
            ({"rope_type": "yarn", "original_max_position_embeddings": -4}, "must be positive"),
            ({"full_attention": {"rope_type": "default"}}, "not understood"),
            ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
            ({"rope_type": "linear"}, "rope parameters: Expected `float`, got `null`"),
            ({"rope_type": "linear", "factor": -1.0}, "must be positive"),
            ({**LLAMA3, "low_freq_factor": 9.0}, "bands"),
            ("yarn", "not understood"),
        ],
    )
    def test_unsupported(self, parameters, message):
        with pytest.raises(LayoutError, match=message):
            facts(rope_parameters=parameters)

    def test_as_transformers_does(self):
        """Both spellings of a scaled config give transformers' own inverse frequencies."""
        import numpy as np
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = LlamaConfig(**{**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
        ours = facts(**json.loads(config.to_json_string(use_diff=False))).rope
        base = 1 / ours.theta ** (np.arange(0, ours.rotary_dim, 2) / ours.rotary_dim)
        wave = 2 * np.pi / base
        smooth = (ours.original_context / wave - ours.low_freq_factor) / (ours.high_freq_factor - ours.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
        np.testing.assert_allclose((1 - smooth) * base / ours.factor + smooth * base, expected, rtol=1e-6)


WINDOWED = {**LLAMA, "architectures": ["MistralForCausalLM"]}
SMOLLM3 = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"]}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
QWEN2_SHAPES = llama_shapes() | {
    f"model.layers.{i}.self_attn.{name}_proj.bias": (rows,)
    for i in range(2)
    for name, rows in (("q", 16), ("k", 8), ("v", 8))
}


class TestWindow:
    @pytest.mark.parametrize("said", [{"sliding_window": 8}, {"sliding_window": None}, {}])
    def test_of_all_layers(self, said):
        """A null says that there is none; where nothing is said, transformers has 4096."""
        found = match({**WINDOWED, **said}, llama_shapes()).facts
        assert (found.context_length, found.window) == (32, said.get("sliding_window", 4096))
        assert found.global_layers == ()

    @pytest.mark.parametrize(
        ("said", "window", "seeing_all"),
        [
            ({"use_sliding_window": False, "max_window_layers": 0}, None, ()),
            ({"use_sliding_window": True, "max_window_layers": 1}, 8, (0,)),
            ({"use_sliding_window": True}, None, ()),
            ({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, 8, (1,)),
            ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None, ()),
        ],
    )
    def test_of_some_layers(self, said, window, seeing_all):
        found = match({**QWEN2, **said}, QWEN2_SHAPES).facts
        assert (found.window, found.global_layers) == (window, seeing_all)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({**WINDOWED, "sliding_window": "8"}, r"Expected `int \| null`.*window"),
            ({**WINDOWED, "sliding_window": 0}, "window is 0, a positive number"),
            ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"]}, "is not a list of"),
            ({**QWEN2, "use_sliding_window": True, "layer_types": ["chunked", "chunked"]}, "is not a list of"),
            ({**QWEN2, "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
            ({**QWEN2, "use_sliding_window": True, "num_hidden_layers": 10**15}, r"10{15} layers"),
        ],
    )
    def test_what_cannot_be(self, config, message):
        with pytest.raises(LayoutError, match=message):
            match(config, llama_shapes())

    def test_more_heads_than_tensors(self):
        config = {**LLAMA, "architectures": ["StableLmForCausalLM"], "qk_layernorm": True, "hidden_size": 8 * 10**12,
                  "num_attention_heads": 10**12, "num_key_value_heads": 10**12}  # fmt: skip
        with pytest.raises(LayoutError, match=r"num_heads is 10{12} for \d+ tensors"):
            match(config, llama_shapes())


class TestComputed:
    @pytest.mark.parametrize(
        ("dtype", "scale"), [(None, 12**0.5), ("float32", 12**0.5), ("bfloat16", 3.46875), ("float16", 3.46484375)]
    )
    def test_rounded_to_the_type_of_the_weights(self, dtype, scale):
        shapes = {k: tuple(12 if n == 16 else n for n in v) for k, v in llama_shapes().items()}
        config = {**LLAMA, "architectures": ["GemmaForCausalLM"], "hidden_size": 12, "head_dim": 4,
                  "tie_word_embeddings": False, "torch_dtype": dtype}  # fmt: skip
        for name in ("q", "k", "v", "o"):
            for i in range(2):
                rows = 16 if name in "qo" else 8
                shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (12, 16) if name == "o" else (rows, 12)
        assert match(config, shapes).facts.embed_scale == pytest.approx(scale, rel=1e-7)

    @pytest.mark.parametrize("scaling", [0, "8", [8], 10**400])
    def test_from_what_cannot_be(self, scaling):
        config = {**LLAMA, "architectures": ["GraniteForCausalLM"], "logits_scaling": scaling}
        with pytest.raises(LayoutError, match=r"logit_scale is computed from .*, a positive number"):
            match(config, llama_shapes())


class TestRotatedLayers:
    @pytest.mark.parametrize(
        ("given", "skipped"),
        [({"no_rope_layers": [0, 1]}, (0,)), ({}, ()), ({"no_rope_layer_interval": 1}, (0, 1)),
         ({"no_rope_layer_interval": 2}, (1,))],
    )  # fmt: skip
    def test_flags_or_interval(self, given, skipped):
        rope = match({**SMOLLM3, **given, "tie_word_embeddings": False}, llama_shapes()).facts.rope
        assert rope is not None
        assert rope.skipped == skipped

    @pytest.mark.parametrize(
        "given", [{"no_rope_layers": [1]}, {"no_rope_layer_interval": 0}, {"num_hidden_layers": 10**15}]
    )
    def test_what_cannot_be(self, given):
        with pytest.raises(LayoutError, match=r"no_rope_layer|10{15} layers"):
            match({**SMOLLM3, **given, "tie_word_embeddings": False}, llama_shapes())


class TestUnsupportedFacts:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("hidden_act", "tanh", "hidden_act = 'tanh'; layout llama supports relu"),
            ("sliding_window", 4096, "sliding_window = 4096"),
            ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5"),
            ("num_hidden_layers", None, "has no 'num_hidden_layers'"),
            ("num_hidden_layers", "two", "Expected `int`"),
            ("num_hidden_layers", 2.0, "Expected `int`"),
            ("num_hidden_layers", True, "Expected `int`"),
            ("num_hidden_layers", 10**15, "10{15} layers"),
            ("num_hidden_layers", 0, "num_layers is 0"),
            ("vocab_size", -5, "vocab_size is -5"),
            ("num_attention_heads", 3, "16 is not a multiple of 3"),
            ("num_attention_heads", 0, "not a multiple of 0"),
            ("num_key_value_heads", 3, "evenly"),
            ("attention_bias", "yes", "true or false was expected"),
        ],
    )
    def test_llama(self, key, value, message):
        with pytest.raises(LayoutError, match=message) as caught:
            match({**LLAMA, "head_dim": None, key: value}, llama_shapes())
        assert "config.json" in str(caught.value)

    def test_opt_norm_without_weights(self):
        bare = {name: shape for name, shape in opt_shapes().items() if "norm" not in name}
        found = match({**OPT, "layer_norm_elementwise_affine": False}, bare)
        assert not found.facts.norm_affine
        assert not [role for role in found.sources if "norm" in role]
        with pytest.raises(LayoutError, match="norm"):
            match({**OPT, "layer_norm_elementwise_affine": False}, opt_shapes())


class TestMatching:
    def test_unknown_architecture_lists_the_known(self):
        with pytest.raises(LayoutError, match=r"NewForCausalLM; known are .*LlamaForCausalLM.*nearest layout: mistral"):
            match({**LLAMA, "architectures": ["NewForCausalLM"]}, llama_shapes())

    @pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
    def test_no_architecture(self, architectures):
        with pytest.raises(LayoutError, match="the architecture none"):
            match({**LLAMA, "architectures": architectures}, llama_shapes())

    def test_missing_tensor(self):
        shapes = llama_shapes()
        del shapes["model.layers.1.self_attn.q_proj.weight"]
        with pytest.raises(
            LayoutError, match=r"tensor model\.layers\.1\.self_attn\.q_proj\.weight \(role layers\.1\.attn\.q\.weight\)"
        ):
            match(LLAMA, shapes)

    def test_extra_tensor(self):
        shapes = {**llama_shapes(), "model.layers.0.self_attn.q_norm.weight": (4,)}
        with pytest.raises(
            LayoutError, match=r"no place for tensor .*q_norm\.weight; nearest layout: gemma3 \(matches 100"
        ):
            match(LLAMA, shapes)

    def test_a_bias_nobody_declared(self):
        shapes = {**llama_shapes(), "model.layers.0.self_attn.q_proj.bias": (16,)}
        with pytest.raises(LayoutError, match=r"no place for tensor .*q_proj\.bias"):
            match(LLAMA, shapes)

    def test_a_declared_bias_must_be_there(self):
        with pytest.raises(LayoutError, match=r"q_proj\.bias .*is missing"):
            match({**LLAMA, "attention_bias": True}, llama_shapes())

    def test_wrong_shape(self):
        shapes = {**llama_shapes(), "model.norm.weight": (17,)}
        with pytest.raises(LayoutError, match=r"model\.norm\.weight has shape \[17\], \[16\] = \[hidden_size\]"):
            match(LLAMA, shapes)

    def test_the_nearest_layout_may_be_another(self):
        with pytest.raises(LayoutError, match=r"does not fit layout llama.*nearest layout: opt \(matches 100 %\)"):
            match(LLAMA, opt_shapes())

    @pytest.mark.parametrize(
        ("config", "shapes", "prefix"), [(LLAMA, llama_shapes(), "model."), (OPT, opt_shapes(), "model.")]
    )
    def test_names_without_their_prefix(self, config, shapes, prefix):
        found = match(config, {n.removeprefix(prefix): s for n, s in shapes.items()})
        assert found.sources["embed.weight"] in ("embed_tokens.weight", "decoder.embed_tokens.weight")

    def test_known_non_weights_are_ignored(self):
        shapes = {**llama_shapes(), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
        assert match(LLAMA, shapes).sources == match(LLAMA, llama_shapes()).sources

    def test_predictors_of_others(self):
        """TurboSparse-Mistral's are left out, in a family that has none they are told."""
        bamboo = {**LLAMA, "architectures": ["BambooForCausalLM"]}
        guesses = {f"model.layers.{i}.mlp.predictor.fc{n}.weight": (8, 16) for i in (0, 1) for n in (1, 2)}
        assert match(bamboo, {**llama_shapes(), **guesses}).sources == match(bamboo, llama_shapes()).sources
        with pytest.raises(
            LayoutError, match=r"no place for tensor model\.layers\.0\.mlp\.predictor\.fc1\.weight and 3"
        ):
            match(LLAMA, {**llama_shapes(), **guesses})

    def test_a_tied_head_may_be_there_twice(self):
        found = match({**LLAMA, "tie_word_embeddings": True}, llama_shapes())
        assert "head.weight" not in found.sources
        with pytest.raises(LayoutError, match=r"lm_head\.weight .*is missing"):
            match(LLAMA, {n: s for n, s in llama_shapes().items() if n != "lm_head.weight"})


class TestSchema:
    @pytest.fixture
    def table(self) -> dict[str, Any]:
        return tomllib.loads((LAYOUTS / "llama.toml").read_text())

    def test_it_reads(self, table):
        assert isinstance(parse_layout(table, "here"), Layout)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update(schema=2), "schema 2; this version reads schema 1"),
            (lambda t: t.pop("schema"), "schema None"),
            (lambda t: t.update(colour="red"), "unknown field `colour`"),
            (lambda t: t["facts"].update(wings=2), "unknown fact wings"),
            (lambda t: t["facts"].pop("norm"), "missing fact norm"),
            (lambda t: t["facts"].update(norm={"kye": "norm"}), "unknown field `kye`"),
            (lambda t: t["facts"].update(norm={}), "either key or expr, or when"),
            (lambda t: t["facts"].update(norm={"key": "a", "default": 1, "expr": "2"}), "both default and expr"),
            (lambda t: t["facts"].update(head_dim={"expr": "hidden_size +"}), "is not a size"),
            (lambda t: t["facts"].update(head_dim={"expr": "wings"}), "names a fact that is not there"),
            (lambda t: t["conditions"].update(x={}), "either key or differ"),
            (lambda t: t["conditions"].update(x={"differ": ["a", "b"]}), "unknown facts"),
            (lambda t: t["conditions"].update(norm={"key": "x"}), "name of a fact"),
            (lambda t: t["tensors"]["head.weight"].update(when=["moon"]), "unknown condition moon"),
            (lambda t: t["tensors"]["head.weight"].update(shape=[]), "has no shape"),
            (lambda t: t["tensors"]["head.weight"].update(shape=["wings"]), "names a fact that is not there"),
            (lambda t: t["tensors"]["head.weight"].update(name="head.{i}"), "disagree about"),
            (lambda t: t["tensors"]["head.weight"].update(name="head.{h}"), "disagree about {h}"),
            (lambda t: t["tensors"]["head.weight"].update(plus=1.0), "only vectors have plus"),
            (lambda t: t["tensors"]["head.weight"].update(groups="num_heads"), "groups and no rows"),
            (lambda t: t["tensors"]["head.weight"].update(rows=["0", "wings"]), "names a fact that is not there"),
            (lambda t: t["tensors"]["head.weight"].update(rows=["0"]), "length 2"),
            (
                lambda t: t["tensors"]["embed.weight"].update(otherwise=[{"name": "embed.weight"}]),
                "otherwise and no when",
            ),
            (lambda t: t["tensors"]["final_norm.weight"].update(transposed=True), "cannot be transposed"),
            (lambda t: (t["tensors"]["head.weight"].update(interleaved=True), t.pop("rope")), "without"),
            (lambda t: t["tensors"]["head.weight"].update(dtype="f16"), "unknown field `dtype`"),
            (lambda t: t.update(prefixes=[]), "must not be empty"),
            (lambda t: t["rope"].update(colour=1), "unknown field `colour`"),
        ],
    )
    def test_broken(self, table, change, message):
        change(table)
        with pytest.raises(LayoutError, match=message) as caught:
            parse_layout(table, "here.toml")
        assert "here.toml" in str(caught.value)

    def test_a_role_such_a_model_has_not(self, table):
        table["tensors"]["layers.{i}.attn.wings"] = {"name": "{prefix}layers.{i}.wings", "shape": ["hidden_size"]}
        layout = parse_layout(table, "here")
        with pytest.raises(LayoutError, match=r"layers\.0\.attn\.wings, a role such a model has not"):
            match_layout(layout, LLAMA, llama_shapes())

    def test_a_shape_the_role_has_not(self, table):
        table["tensors"]["head.weight"]["shape"] = ["hidden_size", "vocab_size"]
        with pytest.raises(LayoutError, match=r"gives head\.weight the shape \[16, 20\], not \[20, 16\]"):
            match_layout(parse_layout(table, "here"), LLAMA, llama_shapes())

    @pytest.mark.parametrize(
        ("taken", "message"),
        [
            ({"rows": ["0", "vocab_size + 1"]}, "rows 0..21 of 1 parts of 20 rows"),
            ({"rows": ["0", "2"], "groups": "3"}, "of 3 parts of 20 rows"),
            ({"rows": ["0", "2"]}, r"takes \[2, 16\] for head.weight, not \[20, 16\]"),
            ({"interleaved": True, "rows": ["0", "19"]}, "19 rows are no whole heads of 4"),
        ],
    )
    def test_rows_that_cannot_be_taken(self, table, taken, message):
        table["tensors"]["head.weight"] |= taken
        with pytest.raises(LayoutError, match=message):
            match_layout(parse_layout(table, "here"), LLAMA, llama_shapes())

    def test_a_fact_defined_by_itself(self, table):
        table["facts"]["head_dim"] = {"expr": "num_kv_heads"}
        table["facts"]["num_kv_heads"] = {"expr": "head_dim"}
        with pytest.raises(LayoutError, match="defined by itself"):
            match_layout(parse_layout(table, "here"), LLAMA, llama_shapes())

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(LayoutError, match="cannot be read"):
            read_layout(tmp_path / "none.toml")
        (tmp_path / "bad.toml").write_text("a = = 1")
        with pytest.raises(LayoutError, match="not valid TOML"):
            read_layout(tmp_path / "bad.toml")


class TestExpressions:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("a", 12), ("7", 7), ("a*b", 60), ("a / 4 * b", 15), ("a+b", 17), ("a - b*2 + 1", 3), (" a*2/3 + b ", 13)],
    )
    def test_values(self, text, value):
        assert parse_expression(text).evaluate({"a": 12, "b": 5}.__getitem__) == value

    @pytest.mark.parametrize("text", ["", "a b", "a+", "*a", "a**b", "(a)", "a.b", "a+-b", "1.5", "a;b"])
    def test_not_a_size(self, text):
        with pytest.raises(ValueError, match="is not a size"):
            parse_expression(text)

    def test_quotients_are_exact(self):
        with pytest.raises(ValueError, match="12 is not a multiple of 5"):
            parse_expression("a/b").evaluate({"a": 12, "b": 5}.__getitem__)

    @given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=8))
    def test_as_python_does(self, terms):
        text = " ".join(f"{op} {n}" for op, n in terms)[2:]
        assert parse_expression(text).evaluate({}.__getitem__) == eval(text)
