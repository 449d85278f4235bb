"""GGUF files: the values, names and facts they stand for, and the logits of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashinfer
from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.checkpoint.gguf.rope import llama3_factors
from flashinfer.checkpoint.gguf.tensors import GgufFile
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError
from flashinfer.model.rotary import inverse_frequencies
from flashinfer.quant import codec_named
from flashinfer.store import open_store
from flashinfer.store.facts import Rope
from tests.compile.gguf_files import described, forged, write_gguf
from tests.plain_checkpoint import LLAMA, fill, llama_shapes, write_checkpoint
from tests.shared_data import shared_data

BIG = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 32, "hidden_act": "silu"}
"""Rows that blocks of 256 divide."""


class TestReading:
    def test_what_config_json_would_say(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "x.gguf", llama__rope__freq_base=5e5, tokenizer__ggml__bos_token_id=1)
        c = open_checkpoint(tmp_path / "x.gguf")
        eps = float(np.float32(1e-5))
        assert c.config == {
            **{key: LLAMA[key] for key in LLAMA if key not in ("hidden_act", "rope_theta")}, "rms_norm_eps": eps,
            "rope_parameters": {"rope_theta": 5e5}, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
        }  # fmt: skip
        assert {n: t.shape for n, t in c.tensors.items()} == llama_shapes()
        assert json.loads(c.text["config.json"].read_text()) == c.config
        where = c.text["config.json"]
        c.close()
        c.close()
        assert not where.exists()

    @pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q6_K])
    def test_rows_and_columns(self, tmp_path: Path, kind: Type) -> None:
        """Interleaved rows too: every part of every tensor is what the whole is."""
        config = BIG if kind == Type.Q6_K else LLAMA | {"hidden_size": 32, "intermediate_size": 64}
        tensors = write_gguf(tmp_path / "x.gguf", config, kind=kind)
        c = open_checkpoint(tmp_path)
        for name, expected in tensors.items():
            dtype = c.tensors[name].dtype
            assert dtype == {Type.F16: "f16", Type.BF16: "bf16"}.get(kind, "f32") or expected.ndim == 1
            rows, cols = c.tensors[name].matrix
            table = expected.reshape(rows, cols)

            def decoded(words, dtype=dtype):
                return codec_named(dtype).decode(np.ascontiguousarray(words).view(np.uint8))

            for a, b in ((0, rows), (rows // 3, rows // 2 + 1)):
                assert (decoded(c.read_rows(name, a, b)) == table[a:b]).all(), name
            some = np.array([cols - 1, 0, 3])
            assert (decoded(c.read_columns(name, slice(3, cols - 2))) == table[:, 3:-2]).all(), name
            assert (decoded(c.read_columns(name, some)) == table[:, some]).all(), name
            c.will_need(name)
        c.close()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        kind=st.sampled_from([Type.Q4_0, Type.Q5_1, Type.Q8_0]), a=st.data(), strip=st.sampled_from([1, 200, 1 << 18])
    )
    def test_any_part_of_a_quantised_matrix(self, tmp_path: Path, monkeypatch, kind: Type, a, strip: int) -> None:
        monkeypatch.setattr("flashinfer.checkpoint.gguf.tensors._STRIP", strip)
        values = fill({"m": (9, 128)})["m"]
        write_matrix(tmp_path / "m.gguf", gguf.quants.quantize(values, kind), kind)
        whole = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        file = GgufFile(tmp_path / "m.gguf")
        r0, r1 = sorted(a.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
        c0, c1 = sorted(a.draw(st.tuples(st.integers(0, 128), st.integers(0, 128))))
        assert (file.read_rows("m", r0, r1).view("<f4") == whole[r0:r1]).all()
        assert (file.read_columns("m", slice(c0, c1)).view("<f4") == whole[:, c0:c1]).all()
        file.close()

    @pytest.mark.parametrize("kind", [k for k in Type if k in gguf.quants._type_traits], ids=lambda k: k.name)
    def test_every_type_the_library_dequantises(self, tmp_path: Path, kind: Type) -> None:
        """Blocks of any bits, so infinities among them: bit for bit the library's values."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(kind).integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
        write_matrix(tmp_path / "m.gguf", data, kind)
        file = GgufFile(tmp_path / "m.gguf")
        assert file.tensors["m"].shape == (3, 512)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, kind)
            got = codec_named(file.tensors["m"].dtype).decode(file.read_rows("m", 0, 3).view(np.uint8))
        assert np.array_equal(got, expected, equal_nan=True)
        file.close()

    @pytest.mark.parametrize("kind", [Type.F64, Type.I8, Type.Q8_1], ids=lambda k: k.name)
    def test_a_type_that_is_not_read_is_named(self, tmp_path: Path, kind: Type) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        forged(tmp_path / "m.gguf", tensors=(described("m", (64, 3), kind),), tail=32 + 192 // block * size)
        file = GgufFile(tmp_path / "m.gguf")
        with pytest.raises(CheckpointError, match=f"tensor m of .* is {kind.name}; F32, F16 and BF16 can be packed"):
            file.read_rows("m", 0, 3)
        file.close()

    def test_memory_is_that_of_the_part(self, tmp_path: Path) -> None:
        """Of a matrix of 32 MiB in float32, a few columns: neither the matrix nor all its blocks are ever there."""
        write_matrix(tmp_path / "m.gguf", np.zeros((4096, 2048 // 32 * 34), np.uint8), Type.Q8_0)
        file = GgufFile(tmp_path / "m.gguf")
        file.read_columns("m", slice(0, 32))
        tracemalloc.start()
        part = file.read_columns("m", slice(70, 130))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert part.nbytes < peak < part.nbytes + (8 << 20)
        file.close()

    def test_the_store_is_that_of_the_checkpoint(self, tmp_path: Path) -> None:
        config = LLAMA | {"hidden_act": "silu", "rms_norm_eps": float(np.float32(1e-5))}
        pack(write_checkpoint(tmp_path / "plain", config), tmp_path / "expected")
        write_gguf(tmp_path / "x.gguf")
        report = pack(tmp_path / "x.gguf", tmp_path / "store")
        assert report.family == "llama"
        for kind in ("dense", "neurons"):
            (expected,), (got,) = ((tmp_path / p).glob(f"{kind}-*") for p in ("expected", "store"))
            assert got.read_bytes() == expected.read_bytes()

    def test_another_activation_by_a_layout(self, tmp_path: Path) -> None:
        """GGUF does not say it; the layout given may."""
        text = (Path(__file__).parents[2] / "layouts" / "llama.toml").read_text()
        start, end = text.index("[facts.activation]"), text.index("[rope]")
        relu = text[:start].rstrip() + '\nactivation = "relu"\n\n' + text[end:]
        (tmp_path / "relu.toml").write_text(relu)
        write_gguf(tmp_path / "x.gguf")
        pack(tmp_path / "x.gguf", tmp_path / "store", layout=tmp_path / "relu.toml")
        opened = open_store(tmp_path / "store")
        assert opened.manifest.facts.activation == "relu"

    def test_biases(self, tmp_path: Path) -> None:
        """Those of q and k are interleaved as their rows are."""
        tensors = fill(llama_shapes())
        sizes = {name.replace("weight", "bias"): t.shape[:1] for name, t in tensors.items() if "self_attn" in name}
        tensors |= fill(sizes)
        write_gguf(tmp_path / "x.gguf", tensors=tensors)
        c = open_checkpoint(tmp_path / "x.gguf")
        assert c.config["attention_bias"] is True
        for name in sizes:
            assert (c.read_rows(name, 0, 1).view("<f4")[0] == tensors[name]).all()
            assert (c.read_columns(name, slice(1, 7)).view("<f4")[0] == tensors[name][1:7]).all()
        pack(tmp_path / "x.gguf", tmp_path / "store")

    @pytest.mark.parametrize(("eot", "ends"), [(9, [2, 9]), (2, 2), (0xFFFFFFFF, 2)])
    def test_what_ends_a_text(self, tmp_path: Path, eot: int, ends: object) -> None:
        write_gguf(tmp_path / "x.gguf", tokenizer__ggml__eos_token_id=2, tokenizer__ggml__eot_token_id=eot)
        assert open_checkpoint(tmp_path / "x.gguf").config["eos_token_id"] == ends

    def test_a_tied_head(self, tmp_path: Path) -> None:
        tensors = fill(llama_shapes())
        del tensors["lm_head.weight"]
        write_gguf(tmp_path / "x.gguf", tensors=tensors)
        c = open_checkpoint(tmp_path / "x.gguf")
        assert c.config["tie_word_embeddings"] is True
        assert set(c.tensors) == set(tensors)


def write_matrix(path: Path, data: np.ndarray, kind: Type) -> None:
    """A file of nothing but a matrix `m`, already of that type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("m", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestRope:
    @pytest.mark.parametrize(("theta", "factor"), [(5e5, 8.0), (5e5, 32.0), (1e4, 4.0)])
    def test_llama3_factors_are_those_of_the_runtime(self, theta: float, factor: float) -> None:
        plain = Rope(theta=theta, rotary_dim=64)
        scaled = Rope(
            theta=theta, rotary_dim=64, scaling="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
            original_context=8192,
        )  # fmt: skip
        expected = inverse_frequencies(plain, 64) / inverse_frequencies(scaled, 64)
        assert np.allclose(llama3_factors(theta, 64, factor), expected, rtol=1e-5)

    def test_llama3_is_recognised(self, tmp_path: Path) -> None:
        config = LLAMA | {"hidden_size": 256}
        tensors = fill(llama_shapes(config))
        tensors["rope_freqs.weight"] = llama3_factors(5e5, 64, 8.0).astype(np.float32)
        write_gguf(tmp_path / "x.gguf", config, tensors, llama__rope__freq_base=5e5)
        c = open_checkpoint(tmp_path / "x.gguf")
        assert c.config["rope_parameters"]["rope_type"] == "llama3"
        assert c.config["rope_parameters"]["factor"] == 8.0
        assert "rope_freqs.weight" not in c.tensors
        pack(tmp_path / "x.gguf", tmp_path / "store")
        tensors["rope_freqs.weight"][3] = 2.0
        write_gguf(tmp_path / "x.gguf", config, tensors, llama__rope__freq_base=5e5)
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not that of Llama 3\.1"):
            open_checkpoint(tmp_path / "x.gguf")

    def test_linear(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "x.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
        rope = open_checkpoint(tmp_path / "x.gguf").config["rope_parameters"]
        assert rope == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}

    def test_what_cannot_be_followed_is_named_by_the_layout(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "x.gguf", llama__rope__dimension_count=2)
        with pytest.raises(CheckpointError, match=r"partial_rotary_factor 0\.5 is not supported"):
            pack(tmp_path / "x.gguf", tmp_path / "store")

    def test_yarn(self, tmp_path: Path) -> None:
        scaling = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
        write_gguf(tmp_path / "x.gguf", **scaling, llama__rope__scaling__original_context_length=32)
        pack(tmp_path / "x.gguf", tmp_path / "store")
        rope = open_store(tmp_path / "store").manifest.facts.rope
        assert rope is not None
        assert (rope.scaling, rope.factor, rope.original_context) == ("yarn", 4.0, 32)
        write_gguf(tmp_path / "y.gguf", **scaling)
        with pytest.raises(CheckpointError, match="original_context_length"):
            open_checkpoint(tmp_path / "y.gguf")


def reference_logits(config, tensors, tokens) -> np.ndarray:
    """transformers on the dequantised weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()})
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K])
def test_logits_are_those_of_the_dequantised_weights(tmp_path: Path, kind: Type) -> None:
    rng = np.random.default_rng(3)
    tensors = {
        name: (rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)).astype(np.float32)
        for name, shape in llama_shapes(BIG).items()
    }
    meant = write_gguf(tmp_path / "x.gguf", BIG, tensors, kind)
    pack(tmp_path / "x.gguf", tmp_path / "store")
    tokens = [int(t) for t in rng.integers(0, BIG["vocab_size"], 12)]
    expected = reference_logits(BIG, meant, tokens)
    with Model.open(tmp_path / "store") as model:
        assert np.abs(model.logits(model.session(), tokens) - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.02


@pytest.mark.shared
def test_a_real_model_writes_a_story(tmp_path: Path) -> None:
    pack(shared_data("gguf/stories260K.gguf"), tmp_path / "store")
    with flashinfer.load(tmp_path / "store") as model:
        text = model.generate("Once upon a time", max_new_tokens=40).text
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
