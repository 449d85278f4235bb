"""A model that others quantised: its store holds their codes, and streams the logits of the values they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.checkpoint import raw
from flashinfer.checkpoint.quantised import integers
from flashinfer.config import BackendName, Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.pack import stream
from flashinfer.quant import codec_named
from flashinfer.store import Manifest, neurons, open_store
from tests import twin as twins
from tests.checkpoints import make_llama, save
from tests.quantised_checkpoints import Floats, Integers, Scheme, awq, bitsandbytes, gptq, quantised
from tests.twin import LLAMA_LAYER, Twin, TwinWeights

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 96, 21)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 96, 4)]
SCHEMES = {
    "gptq": (gptq(32), "int4g32", "int4g32iz"),
    "gptq-asymmetric": (gptq(64, symmetric=False), "int4g64iz", "int4g64iz"),
    "gptq-act-order": (gptq(32, ordered=True), None, "int4g32iz"),
    "awq": (awq(64), "int4g64iz", "int4g64iz"),
    "nf4": (bitsandbytes(nested=False), "nf4f32", "nf4"),
    "nf4-nested": (bitsandbytes(nested=True), "nf4", "nf4"),
}
"""With the codec that holds the codes, and the one that down gets."""
HIDDEN, NEURONS = 128, 192
BACKENDS: dict[BackendName, float] = {"torch": 1e-5, **({"native": 1e-3} if has_native() else {})}
"""With how far logits may be from transformers': the native backend rounds activations beside integers."""


class Made:
    def __init__(self, path: Path, name: str) -> None:
        self.scheme, self.kept, self.nearest = SCHEMES[name]
        self.path, self.store, self.dequantised = path / "quantised", path / "store.flash", path / "dequantised"
        source = make_llama(path / "source", hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=2)
        self.matrices = quantised(source, self.path, self.dequantised, self.scheme)
        pack(self.path, self.store, bundles_per_record=3)

    @property
    def manifest(self) -> Manifest:
        return open_store(self.store).manifest


@pytest.fixture(scope="module", params=SCHEMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), request.param)


def rows_of(m: Integers | Floats, codec: str) -> tuple[np.ndarray, str]:
    """The matrix by the letter of docs/format.md."""
    rows, columns = m.codes.shape
    if isinstance(m, Integers):
        groups = m.scales.shape[1]
        before = [m.scales.view(np.uint8), *([m.zeros] if codec.endswith("iz") else [])]
        assert m.scales.shape == m.zeros.shape == (rows, groups)
    elif codec == "nf4":
        assert m.nested is not None
        codes, largest, offset = m.nested
        floats = np.array([[offset, largest[row * columns // 64 // 256]] for row in range(rows)], np.float32)
        before = [floats.view(np.uint8), codes.reshape(rows, -1)]
    else:
        before = [m.scales.reshape(rows, -1).view(np.uint8)]
    head = np.concatenate(before, axis=1)
    head = np.pad(head, ((0, 0), (0, -head.shape[1] % 16)))
    halves = m.codes.reshape(rows, -1, 2, 16)
    return np.concatenate([head, (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)], axis=1), codec


class CodesTwin(TwinWeights):
    """A twin that takes the codes of `made`, and rounds to the nearest codec itself where they are not kept."""

    made: Made

    def _coded(self, role: str, values: torch.Tensor) -> tuple[np.ndarray, str]:
        layer, module = role.split(".")[1], LLAMA_LAYER.get(".".join(role.split(".")[2:4]))
        found = self.made.matrices.get(f"model.layers.{layer}.{module}.weight")
        if found is None:
            return super()._coded(role, values)
        if self.made.kept is None or module == "mlp.down_proj":
            return codec_named(self.made.nearest).encode(values.float().numpy()), self.made.nearest
        return rows_of(found, self.made.kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_logits_are_the_twins(made: Made, backend: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with the least memory and with all of it."""
    monkeypatch.setattr(twins, "TwinWeights", type("Twin", (CodesTwin,), {"made": made}))
    run = RunConfig(prefill_chunk=9, staging=64 * 1024, ring=32 * 1024, backend=backend)
    with Model.open(made.store, Cap(weight_memory=10**9), run=run) as model:
        twin, everything = Twin(made.dequantised, model.facts, backend=backend), model.plan.weight_total
    prompt, decoded = twin.logits(PROMPT), [twin.logits([t])[0] for t in DECODED]
    with pytest.raises(CapTooSmallError) as refused:
        Model.open(made.store, Cap(weight_memory=1), run=run)
    for cap in (refused.value.floor, everything):
        with Model.open(made.store, Cap(weight_memory=cap), run=run) as model:
            session = model.session()
            assert np.array_equal(model.logits(session, PROMPT), prompt)
            for token, expected in zip(DECODED, decoded, strict=True):
                assert np.array_equal(model.step(session, [token]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_transformers_of_the_values(made: Made, backend: BackendName) -> None:
    """Of gate, up and attention those the codes stand for; of down what rounding its columns makes of them."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(made.dequantised, dtype=torch.float32).eval()
    nearest = codec_named(made.nearest)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in made.matrices and (made.kept is None or "down" in name):
                turned = weight.T if "down" in name else weight
                values = nearest.decode(nearest.encode(turned.numpy()), turned.shape[1])
                weight.copy_(torch.from_numpy(values.T if "down" in name else values))
        expected = reference(torch.tensor([PROMPT])).logits[0].numpy()
    with Model.open(made.store, Cap(weight_memory=10**9), run=RunConfig(backend=backend)) as model:
        found = model.logits(model.session(), PROMPT)
    np.testing.assert_allclose(found, expected, rtol=0, atol=BACKENDS[backend])


def test_the_manifest_says_what_was_kept(made: Made) -> None:
    m = made.manifest
    codecs = {role: t.codec for role, t in m.tensors.items()}
    codecs |= {f"layers.{i}.ffn.{p.role}": p.codec for i, layer in enumerate(m.layers) for p in layer.parts}
    assert len(m.origins) == len(made.matrices) == 14
    for role, origin in m.origins.items():
        kept = made.kept is not None and "down" not in role
        assert (origin.kept, codecs[role]) == (kept, made.kept if kept else made.nearest)
        assert origin.scheme.startswith(made.scheme.options["quant_method"])
    assert {codecs[r] for r in ("embed.weight", "head.weight")} == {"f32"}


@pytest.mark.parametrize("permuted", [False, True])
def test_every_neuron_has_its_codes_whatever_the_order(made: Made, tmp_path: Path, permuted: bool) -> None:
    orders = [np.random.default_rng(i).permutation(NEURONS) for i in range(2)]
    pack(made.path, tmp_path / "other", permutation=orders if permuted else None, bundles_per_record=7,
         decision="bundled")  # fmt: skip
    run = RunConfig(backend="torch")
    logits = []
    for path in (made.store, tmp_path / "other"):
        with Model.open(path, Cap(weight_memory=10**9), run=run) as model:
            logits.append(model.logits(model.session(), PROMPT))
    assert np.array_equal(*logits)


def test_the_same_bytes_whatever_the_pieces(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (neurons, "PACK_BLOCK", 3000),
        (stream, "COPY_CHUNK", 5000),
        (stream, "_PIECE", 700),
        (raw, "COPY_CHUNK", 1000),
        (integers, "COPY_CHUNK", 100),
        (integers, "_STRIP", 5),
    ):
        monkeypatch.setattr(module, name, value)
    pack(made.path, tmp_path / "other", bundles_per_record=3)
    assert open_store(tmp_path / "other").manifest == made.manifest


def packed_codecs(store: Path) -> dict[str, tuple[str, bool]]:
    m = open_store(store).manifest
    codecs = {role: t.codec for role, t in m.tensors.items()}
    codecs |= {f"layers.{i}.ffn.{p.role}": p.codec for i, layer in enumerate(m.layers) for p in layer.parts}
    return {role: (codecs[role], origin.kept) for role, origin in m.origins.items()}


def test_a_recipe_rounds_what_it_names(made: Made, tmp_path: Path) -> None:
    """And what it does not name keeps its codes."""
    pack(made.path, tmp_path / "store", quant="attn=int8,layers.*.ffn.down.weight=f16,head=int8")
    found = packed_codecs(tmp_path / "store")
    assert found["layers.0.attn.q.weight"] == ("int8", False)
    assert found["layers.1.ffn.down.weight"] == ("f16", False)
    kept = made.kept is not None
    assert found["layers.1.ffn.up.weight"] == (made.kept if kept else made.nearest, kept)


def test_a_recipe_of_the_same_codec_keeps_the_codes(made: Made, tmp_path: Path) -> None:
    if made.kept is None:
        pytest.skip("no codec holds them")
    pack(made.path, tmp_path / "store", quant=f"attn={made.kept},ffn={made.kept}")
    found = packed_codecs(tmp_path / "store")
    assert found["layers.0.attn.q.weight"] == (made.kept, True)
    assert found["layers.0.ffn.down.weight"] == (made.kept, False)
    said: dict[str, Any] = json.loads((tmp_path / "store" / "manifest.json").read_text())
    before = json.loads((made.store / "manifest.json").read_text())
    role = "layers.0.attn.q.weight"
    assert said["tensors"][role]["xxh3"] == before["tensors"][role]["xxh3"]


@pytest.mark.parametrize("scheme", [gptq(32, symmetric=False), awq(32)], ids=["gptq", "awq"])
def test_a_mixture(tmp_path: Path, scheme: Scheme) -> None:
    """Experts come one by one: their values are what the codes stand for. Routers are as they were."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=96, num_hidden_layers=2, num_local_experts=4, **sizes)
    source = save(AutoModelForCausalLM.from_config, config, tmp_path / "source")
    matrices = quantised(source, tmp_path / "quantised", tmp_path / "dequantised", scheme)
    assert sum(".experts." in name for name in matrices) == 2 * 4 * 3
    stores = {}
    for name in ("quantised", "dequantised"):
        pack(tmp_path / name, tmp_path / f"{name}.flash", quant="ffn=f32")
        with Model.open(tmp_path / f"{name}.flash", run=RunConfig(backend="torch")) as model:
            stores[name] = model.logits(model.session(), PROMPT)
    assert np.abs(stores["quantised"] - stores["dequantised"]).max() <= 1e-4
    pack(tmp_path / "quantised", tmp_path / "codes.flash")
    manifest = open_store(tmp_path / "codes.flash").manifest
    assert {o.kept for role, o in manifest.origins.items() if ".attn." in role} == {True}
    assert {p.codec for layer in manifest.layers for p in layer.parts} == {"int4g32iz"}  # kept, or rounded again
    assert not any("router" in role for role in manifest.origins)
