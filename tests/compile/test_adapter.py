"""LoRA adapters as peft writes them, merged; and adapters that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.checkpoint.adapter import open_adapter
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError
from flashinfer.quant import codec_named
from tests.adapters import ATTENTION, MODULE, TOKENS, A, B, by_hand, made_by_peft
from tests.checkpoints import make_llama, make_opt
from tests.plain_checkpoint import fill, write_checkpoint


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": make_llama(root / "llama"),
        "llama-biases": make_llama(root / "llama-biases", attention_bias=True, mlp_bias=True),
        "llama-tied": make_llama(root / "llama-tied", tie_word_embeddings=True),
        "opt": make_opt(root / "opt", tie_word_embeddings=False),
    }


def merged_logits(base: Path, adapter: Path, store: Path) -> np.ndarray:
    pack(base, store, merge_adapter=adapter)
    with Model.open(store) as model:
        return model.logits(model.session(), TOKENS)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 9, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION}),
    "patterns": ("llama", {
        "r": 4, "lora_alpha": 2, "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6}, "alpha_pattern": {r".*\.0\..*v_proj": 5},
    }),
    "modules to save": ("llama", {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"r": 2, "target_modules": ["embed_tokens", "o_proj", "lm_head"]}),
    "all biases": ("llama-biases", {"r": 2, "target_modules": ATTENTION, "bias": "all"}),
    "biases of it": ("opt", {"r": 2, "target_modules": [*ATTENTION, "fc1", "fc2"], "bias": "lora_only"}),
    "gaussian": ("opt", {"r": 3, "target_modules": ["fc2"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(tmp_path: Path, bases, case: str) -> None:
    base, config = bases[CASES[case][0]], CASES[case][1]
    expected = made_by_peft(base, tmp_path / "adapter", **config)
    got = merged_logits(base, tmp_path / "adapter", tmp_path / "store")
    assert np.abs(got - expected).max() <= 1e-4
    pack(base, tmp_path / "unmerged")
    with Model.open(tmp_path / "unmerged") as model:
        assert np.abs(model.logits(model.session(), TOKENS) - expected).max() > 1e-2


def test_a_bin_file(tmp_path: Path, bases) -> None:
    """Older peft wrote it; this one's tensors in such a file."""
    from safetensors.torch import load_file

    expected = made_by_peft(bases["llama"], tmp_path / "adapter", r=2, target_modules=ATTENTION)
    safe = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    got = merged_logits(bases["llama"], tmp_path / "adapter", tmp_path / "store")
    assert np.abs(got - expected).max() <= 1e-4


class TestParts:
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_rows_and_columns(self, tmp_path: Path, monkeypatch, dtype: str, transposed: bool) -> None:
        """Every part of a merged matrix is what the whole is; `[in, out]` is the transpose."""
        monkeypatch.setattr("flashinfer.checkpoint.sum._STRIP", 40)
        name = "model.layers.0.mlp.gate_proj.weight"  # [21, 16]
        size, out = (21, 16) if transposed else (16, 21)
        module = "base_model.model.model.layers.0.mlp.gate_proj"
        tensors = fill({f"{module}.lora_A.weight": (2, size), f"{module}.lora_B.weight": (out, 2)})
        a, b = tensors.values()
        base = write_checkpoint(tmp_path / "base", dtypes=dtype)
        c = open_checkpoint(base, adapter=by_hand(tmp_path / "adapter", tensors, fan_in_fan_out=transposed))
        codec = codec_named(dtype)
        plain = open_checkpoint(base)
        before = codec.decode(plain.read_rows(name, 0, 21).view(np.uint8))
        change = np.float32(1.5) * (b @ a)
        expected = codec.decode(codec.encode(before + (change.T if transposed else change)))

        def decoded(words):
            return codec.decode(np.ascontiguousarray(words).view(np.uint8))

        some = np.array([15, 0, 2])
        assert (decoded(c.read_rows(name, 0, 21)) == expected).all()
        assert (decoded(c.read_rows(name, 7, 13)) == expected[7:13]).all()
        assert (decoded(c.read_columns(name, slice(3, 9))) == expected[:, 3:9]).all()
        assert (decoded(c.read_columns(name, some)) == expected[:, some]).all()
        other = "model.layers.1.mlp.gate_proj.weight"
        assert (c.read_rows(other, 0, 21) == plain.read_rows(other, 0, 21)).all()
        c.will_need(name)
        c.close()

    def test_what_an_adapter_says(self, tmp_path: Path) -> None:
        adapter = open_adapter(by_hand(tmp_path / "adapter", lora_alpha=5))
        (name,) = adapter.low_rank
        assert name == "model.layers.0.self_attn.q_proj.weight"
        assert (adapter.low_rank[name].scale, adapter.low_rank[name].shape) == (2.5, (16, 16))
        adapter.file.close()

    def test_names_without_the_first_part(self, tmp_path: Path) -> None:
        tensors = {n.removeprefix("model."): t for n, t in fill_plain().items()}
        base = write_checkpoint(tmp_path / "base", tensors=tensors)
        c = open_checkpoint(base, adapter=by_hand(tmp_path / "adapter"))
        name = "layers.0.self_attn.q_proj.weight"
        assert (c.read_rows(name, 0, 16) != open_checkpoint(base).read_rows(name, 0, 16)).any()


def fill_plain() -> dict[str, np.ndarray]:
    from tests.plain_checkpoint import llama_shapes

    return fill(llama_shapes())


class TestRefused:
    def refuse(self, tmp_path: Path, message: str, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> None:
        base = write_checkpoint(tmp_path / "base")
        adapter = by_hand(tmp_path / "adapter", tensors, **config)
        with pytest.raises(CheckpointError, match=message) as caught:
            pack(base, tmp_path / "store", merge_adapter=adapter)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"peft_type": "IA3"}, "is of type IA3; LORA can be merged"),
            ({"use_dora": True}, "is DoRA"),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4, which changes the base"),
            ({"layer_replication": [[0, 2]]}, "sets layer_replication, which is not followed"),
            ({"lora_bias": True}, "sets lora_bias, which is not followed"),
            ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
            ({"of_tomorrow": 1}, "sets of_tomorrow"),
            ({"r": "four"}, r"adapter_config\.json: Expected `int`"),
            ({"r": 0}, "the rank 0"),
            ({"r": 3}, r"A \[3, in\] and B \[out, 3\] were expected"),
            ({"rank_pattern": {"q_proj": 1}}, r"A \[1, in\]"),
            ({"alpha_pattern": {"(": 1}}, r"pattern '\(', which is none"),
        ],
    )
    def test_config(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        self.refuse(tmp_path, message, **config)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({A: (2, 16)}, r"has lora tensors \{'A': \[2, 16\]\}"),
            ({A: (2, 16), B: (16,)}, "has lora tensors"),
            (
                {A: (2, 17), B: (16, 2)},
                r"for a tensor .* of shape \[16, 17\], .* of \[16, 16\]: it is for another model",
            ),
            ({"x_proj.lora_A.weight": (2, 16), "x_proj.lora_B.weight": (16, 2)}, r"x_proj\.weight, which .* has not"),
            ({A: (2, 16), B: (16, 2), "q_proj.lora_magnitude_vector": (16,)}, r"plain LoRA"),
            ({"q_proj.lora_B.bias": (2,)}, r"plain LoRA"),
            ({"q_proj.weight": (4, 4)}, "it is for another model"),
            ({}, "holds no tensors"),
        ],
    )
    def test_tensors(self, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
        self.refuse(tmp_path, message, fill({MODULE + name: shape for name, shape in shapes.items()}))

    @pytest.mark.parametrize("part", [A, B])
    def test_not_finite(self, tmp_path: Path, part: str) -> None:
        tensors = fill({MODULE + A: (2, 16), MODULE + B: (16, 2)})
        tensors[MODULE + part][1, 1] = np.nan
        self.refuse(tmp_path, rf"tensor .*{part} of .*adapter_model\.safetensors holds NaN", tensors)

    def test_a_head_that_is_the_embedding(self, tmp_path: Path, bases) -> None:
        name = "base_model.model.model.embed_tokens.weight"
        adapter = by_hand(tmp_path / "adapter", fill({name: (96, 48)}))
        with pytest.raises(CheckpointError, match="head and embedding are one"):
            pack(bases["llama-tied"], tmp_path / "store", merge_adapter=adapter)

    def test_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
            open_adapter(tmp_path)
        by_hand(tmp_path / "x")
        (tmp_path / "x" / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
            open_adapter(tmp_path / "x")


def test_after_a_delta(tmp_path: Path) -> None:
    """Both at once: the adapter belongs to the target."""
    base, delta = write_checkpoint(tmp_path / "base"), write_checkpoint(tmp_path / "delta")
    adapter = by_hand(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    c = open_checkpoint(base, delta=delta, adapter=adapter)
    twice = 2 * open_checkpoint(base).read_rows(name, 0, 16).view(np.float32)
    a, b = fill({MODULE + A: (2, 16), MODULE + B: (16, 2)}).values()
    assert np.allclose(c.read_rows(name, 0, 16).view(np.float32), twice + 1.5 * (b @ a), atol=1e-5)
