"""Every tensor read back from the store equals the checkpoint's."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashinfer
from flashinfer.checkpoint import raw
from flashinfer.errors import CheckpointError, LayoutError
from flashinfer.pack import PackReport, pack, stream
from flashinfer.store import neurons, open_store, verify
from tests.checkpoints import make_llama, make_opt
from tests.plain_checkpoint import LLAMA, OPT, fill, llama_shapes, save, write_checkpoint
from tests.store_contents import checkpoint_tensors, manifest_of, read_back, values

MADE = {
    "llama": (make_llama, {}),
    "llama-biases": (make_llama, {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama-tied": (make_llama, {"tie_word_embeddings": True, "intermediate_size": 131}),
    "opt": (make_opt, {}),
    "opt-350m": (make_opt, {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "opt-no-bias": (make_opt, {"enable_bias": False, "ffn_dim": 97}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(variant, dtype)`: a checkpoint by transformers, made once."""
    known: dict[tuple[str, str], Path] = {}

    def get(variant: str, dtype: str) -> Path:
        if (variant, dtype) not in known:
            make, overrides = MADE[variant]
            known[variant, dtype] = make(tmp_path_factory.mktemp("made") / variant, dtype=dtype, **overrides)
        return known[variant, dtype]

    return get


def assert_same(store: Path, checkpoint: Path, quant: str | None = None) -> None:
    """Bit for bit; after rounding to `quant` by torch where that was asked for (vectors stay f32)."""
    import torch

    rounding = {"f16": torch.float16, "bf16": torch.bfloat16}.get(quant or "", torch.float32)
    found, expected = read_back(store), checkpoint_tensors(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = torch.from_numpy(tensor).to(rounding).float().numpy() if tensor.ndim == 2 else tensor
        assert found[name].shape == wanted.shape, name
        assert (found[name] == wanted).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", sorted(MADE))
@pytest.mark.parametrize("permuted", [False, True])
def test_round_trip(made, tmp_path, variant, dtype, permuted):
    checkpoint = made(variant, dtype)
    config = json.loads((checkpoint / "config.json").read_text())
    neurons = config.get("ffn_dim", config.get("intermediate_size"))
    rng = np.random.default_rng(0)
    permutation = [rng.permutation(neurons) for _ in range(3)] if permuted else None
    report = pack(checkpoint, tmp_path / "store", permutation=permutation)
    assert_same(tmp_path / "store", checkpoint)
    opened = open_store(tmp_path / "store")
    assert verify(opened) == []
    assert report.weight_bytes == opened.manifest.weight_bytes()
    codec = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    assert {t.codec for t in opened.manifest.tensors.values() if len(t.shape) == 2} == {codec}


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quant(made, tmp_path, dtype, quant):
    checkpoint = made("opt", dtype)
    pack(checkpoint, tmp_path / "store", quant=quant)
    assert_same(tmp_path / "store", checkpoint, quant)


@pytest.mark.parametrize("decision", ["separate", "bundled"])
@pytest.mark.parametrize("bundles", [1, 3, 160])
@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("variant", ["llama-biases", "opt"])
def test_geometries(made, tmp_path, variant, decision, bundles, alignment):
    checkpoint = made(variant, "float16")
    pack(checkpoint, tmp_path / "store", decision=decision, bundles_per_record=bundles, alignment=alignment)
    assert_same(tmp_path / "store", checkpoint)
    layer = open_store(tmp_path / "store").manifest.layers[0]
    assert (layer.decision, layer.bundles_per_record) == (decision, bundles)
    assert layer.record_bytes % alignment == 0


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bundles", [1, 3, 7])
def test_small_blocks(made, tmp_path, monkeypatch, permuted, bundles):
    """The same bytes whatever the pieces pack works in."""
    permutation = [np.arange(160)[::-1]] * 3 if permuted else None
    checkpoint = made("llama", "float32")
    pack(checkpoint, tmp_path / "one", permutation=permutation, bundles_per_record=bundles, quant="f16")
    for module, name, value in (
        (neurons, "PACK_BLOCK", 3000),
        (stream, "COPY_CHUNK", 200),
        (stream, "_PIECE", 7),
        (raw, "COPY_CHUNK", 100),
    ):
        monkeypatch.setattr(module, name, value)
    pack(checkpoint, tmp_path / "two", permutation=permutation, bundles_per_record=bundles, quant="f16")
    assert manifest_of(tmp_path / "one") == manifest_of(tmp_path / "two")
    assert_same(tmp_path / "two", checkpoint, "f16")


def test_shards(tmp_path):
    checkpoint = make_llama(tmp_path / "c", max_shard_size="100KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    pack(checkpoint, tmp_path / "store")
    assert_same(tmp_path / "store", checkpoint)


def test_each_tensor_keeps_its_own_type(tmp_path):
    tensors = fill(llama_shapes())
    dtypes = {n: ("f32", "f16", "bf16")[i % 3] for i, n in enumerate(tensors)}
    pack(write_checkpoint(tmp_path / "c", dtypes=dtypes), tmp_path / "store")
    m = open_store(tmp_path / "store").manifest
    for t in m.tensors.values():
        assert t.codec == ("f32" if len(t.shape) == 1 else dtypes[t.source])
    for p in (p for n in m.layers for p in n.parts):
        assert p.codec == dtypes[p.source]
    found = read_back(tmp_path / "store")
    assert all((found[n] == tensors[n]).all() for n in tensors)


def test_permutation_is_in_the_store(tmp_path):
    orders = [np.roll(np.arange(21), 5), np.arange(21)[::-1]]
    pack(write_checkpoint(tmp_path / "c"), tmp_path / "store", permutation=orders)
    m = manifest_of(tmp_path / "store")
    dense = (tmp_path / "store" / m["dense"]["name"]).read_bytes()
    for i, order in enumerate(orders):
        t = m["tensors"][f"layers.{i}.ffn.order"]
        assert np.frombuffer(dense, "<i4", 21, t["offset"]).tolist() == order.tolist()
        assert t["source"] == ""
    decision = m["tensors"]["layers.0.ffn.gate.weight"]
    rows = values(dense[decision["offset"] : decision["offset"] + decision["bytes"]], "f32").reshape(21, 16)
    assert (rows == fill(llama_shapes())["model.layers.0.mlp.gate_proj.weight"]).all()


def test_packing_is_deterministic(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", OPT)
    for name in ("one", "two"):
        pack(checkpoint, tmp_path / name)
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


def test_report_and_progress(tmp_path):
    seen: list[tuple[int, int]] = []
    checkpoint = write_checkpoint(tmp_path / "c")
    report = pack(str(checkpoint), str(tmp_path / "s"), progress=lambda done, total: seen.append((done, total)))
    assert isinstance(report, PackReport)
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "s").iterdir() if p.name != "manifest.json")
    assert report.weight_bytes == 4 * sum(t.size for t in fill(llama_shapes()).values())
    assert (report.path, report.family) == (tmp_path / "s", "llama")
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_the_function_keeps_its_name_when_the_package_is_imported(tmp_path):
    importlib.import_module("flashinfer.pack.plan")
    flashinfer.pack(write_checkpoint(tmp_path / "c"), tmp_path / "s")
    assert flashinfer.pack is pack


@pytest.mark.parametrize("first", ["import flashinfer.pack", "import flashinfer; flashinfer.pack", "pass"])
def test_the_compile_tower_needs_no_torch(tmp_path, first):
    checkpoint = write_checkpoint(tmp_path / "c")
    code = (
        f"import sys\n{first}\nimport flashinfer\nflashinfer.pack({str(checkpoint)!r}, {str(tmp_path / 's')!r})\n"
        "from flashinfer.pack.plan import plan_pack\n"
        "print([m for m in ('torch', 'transformers', 'flashinfer.engine', 'flashinfer.model') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


class TestErrors:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    @pytest.mark.parametrize(
        "name",
        [
            "model.norm.weight",
            "lm_head.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
        ],
    )
    def test_not_finite(self, tmp_path, name, dtype, value):
        tensors = fill(llama_shapes())
        tensors[name].reshape(-1)[-1] = value
        checkpoint = write_checkpoint(tmp_path / "c", tensors=tensors, dtypes=dtype)
        with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
            pack(checkpoint, tmp_path / "store")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]

    def test_a_bias_that_is_not_finite(self, tmp_path):
        from tests.plain_checkpoint import opt_shapes

        tensors = fill(opt_shapes())
        name = "model.decoder.layers.1.fc1.bias"
        tensors[name][3] = np.nan
        checkpoint = write_checkpoint(tmp_path / "c", OPT, tensors)
        for decision in ("separate", "bundled"):
            with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
                pack(checkpoint, tmp_path / "store", decision=decision)

    def test_overflow(self, tmp_path):
        tensors = fill(llama_shapes())
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name][0, 0] = 70000
        checkpoint = write_checkpoint(tmp_path / "c", tensors=tensors)
        with pytest.raises(CheckpointError, match=f"tensor {name} does not fit f16: .*use bf16 or f32"):
            pack(checkpoint, tmp_path / "store", quant="f16")
        pack(checkpoint, tmp_path / "store", quant="bf16")

    def test_largest_vectors_stay_exact(self, tmp_path):
        tensors = fill(llama_shapes())
        tensors["model.norm.weight"][0] = 70000
        pack(write_checkpoint(tmp_path / "c", tensors=tensors), tmp_path / "s", quant="f16")
        assert read_back(tmp_path / "s")["model.norm.weight"][0] == 70000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"quant": "int3"}, "codec 'int3' is not known; choose one of f32, f16"),
            ({"alignment": 100}, "alignment 100"),
            ({"alignment": 8192}, "alignment 8192"),
            ({"bundles_per_record": 0}, "bundles per record 0"),
            ({"bundles_per_record": 22}, "from 1 to 21"),
            ({"permutation": [range(21)]}, "1 permutations for 2 layers"),
            ({"permutation": [range(21), [0] * 21]}, "permutation of layer 1"),
            ({"permutation": [range(20), range(21)]}, "permutation of layer 0"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(CheckpointError, match=message):
            pack(write_checkpoint(tmp_path / "c"), tmp_path / "store", **options)

    def test_a_dtype_that_cannot_be_packed(self, tmp_path):
        checkpoint = write_checkpoint(tmp_path / "c")
        raw = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is I32"):
            pack(checkpoint, tmp_path / "store")

    def test_a_truncated_shard(self, tmp_path):
        checkpoint = write_checkpoint(tmp_path / "c")
        raw = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(raw[:-100])
        with pytest.raises(CheckpointError, match="truncated"):
            pack(checkpoint, tmp_path / "store")

    def test_missing_and_extra_tensors(self, tmp_path):
        tensors = fill(llama_shapes())
        del tensors["model.norm.weight"]
        # the final norm is no role every model has, but it is one every llama has
        with pytest.raises(LayoutError, match=r"tensor model\.norm\.weight .*is missing"):
            pack(write_checkpoint(tmp_path / "c", tensors=tensors), tmp_path / "store")
        tensors = {**fill(llama_shapes()), "wings": np.ones(3, np.float32)}
        save(tmp_path / "c" / "model.safetensors", tensors)
        with pytest.raises(LayoutError, match="no place for tensor wings"):
            pack(tmp_path / "c", tmp_path / "store")

    def test_a_layout_of_ones_own(self, tmp_path):
        layouts = Path(__file__).parents[2] / "layouts"
        config = {**LLAMA, "architectures": ["MyForCausalLM"]}
        checkpoint = write_checkpoint(tmp_path / "c", config, fill(llama_shapes()))
        with pytest.raises(LayoutError, match="MyForCausalLM"):
            pack(checkpoint, tmp_path / "store")
        pack(checkpoint, tmp_path / "store", layout=layouts / "llama.toml")
        assert verify(open_store(tmp_path / "store")) == []
        with pytest.raises(LayoutError, match="'ffn_dim', which layout opt needs"):
            pack(checkpoint, tmp_path / "other", layout=layouts / "opt.toml")
