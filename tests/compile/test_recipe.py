"""`--quant`: which codec each matrix gets, and that the store holds that codec's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flashinfer.errors import CheckpointError
from flashinfer.pack import pack
from flashinfer.pack.recipe import parse_recipe
from flashinfer.quant import CODECS, GROUPED, codec_named
from flashinfer.store import open_store, verify
from tests.checkpoints import make_llama, make_opt
from tests.twin import role_tensors

ROLES = ["embed.weight", "head.weight", "layers.0.attn.q.weight", "layers.1.ffn.gate.weight", "layers.1.ffn.up.weight"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("recipe") / "llama")


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "store"
    pack(llama, path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [None] * 5),
        ("f16", ["f16"] * 5),
        ("nf4", ["int8", "int8", "nf4", "nf4", "nf4"]),
        ("int4", ["int8", "int8", "int4g64", "int4g64", "int4g64"]),
        ("ffn=nf4, attn=int8,head=f16", [None, "f16", "int8", "nf4", "nf4"]),
        ("ffn=nf4,decision=f16", [None, None, None, "f16", "nf4"]),
        ("nf4,layers.1.*=f32,embed=bf16", ["bf16", "int8", "nf4", "f32", "f32"]),
    ],
)
def test_codecs_by_role(packed: Path, text: str | None, expected: list[str | None]) -> None:
    facts = open_store(packed).manifest.facts
    assert [parse_recipe(text).codec(role, facts) for role in ROLES] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("nope", "nf4"), ("ffn=nope", "nf4"), ("", "choose one of"), ("what=int8", "embed, head"), ("nf4,int8", "first")],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize("quant", ["layers.9.*=int8", "decision=int8,no.such.role=f16"])
def test_a_name_that_fits_nothing(llama: Path, tmp_path: Path, quant: str) -> None:
    with pytest.raises(CheckpointError, match="fits no matrix"):
        pack(llama, tmp_path / "store", quant=quant)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    pack(make_opt(tmp_path / "c"), tmp_path / "store", quant="head=int8,embed=f16")
    tensors = open_store(tmp_path / "store").manifest.tensors
    assert (tensors["embed.weight"].codec, tensors["embed.positions"].codec) == ("f16", "f16")
    pack(make_opt(tmp_path / "d"), tmp_path / "other", quant="nf4")
    tensors = open_store(tmp_path / "other").manifest.tensors
    assert (tensors["embed.weight"].codec, tensors["embed.positions"].codec) == ("int8", "f32")


@pytest.mark.parametrize("codec", [c.name for c in GROUPED])
@pytest.mark.parametrize("decision", ["separate", "bundled"])
def test_the_store_holds_the_codecs_bytes(llama: Path, tmp_path: Path, codec: str, decision) -> None:
    pack(llama, tmp_path / "store", quant=f"ffn={codec},attn={codec}", decision=decision, bundles_per_record=3)
    store, tensors = open_store(tmp_path / "store"), role_tensors(llama)
    assert verify(store) == []
    query = store.manifest.tensors["layers.1.attn.q.weight"]
    assert (query.codec, query.bytes) == (codec, CODECS[codec].row_bytes(query.shape[1]) * query.shape[0])
    rows = tensors["layers.1.attn.q.weight"].float().numpy()
    assert np.array_equal(store.read_tensor("layers.1.attn.q.weight"), decoded(rows, codec))
    data, layer = store.path_of(store.manifest.neurons).read_bytes(), store.manifest.layers[1]
    for neuron in (0, 1, layer.neurons - 1):
        at = layer.offset + neuron // 3 * layer.record_bytes + neuron % 3 * layer.bundle_bytes
        for part in layer.parts:
            matrix = tensors[f"layers.1.ffn.{part.role}"].float()
            row = (matrix.T if part.role == "down.weight" else matrix)[neuron].contiguous().numpy()[None]
            expected = CODECS[codec].encode(row).tobytes()
            assert data[at + part.offset : at + part.offset + len(expected)] == expected


def decoded(rows, codec: str):
    coder = codec_named(codec)
    return coder.decode(coder.encode(rows), rows.shape[1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_only_where_it_is_allowed(llama: Path, tmp_path: Path, value: float) -> None:
    broken = make_llama(tmp_path / "c")
    from safetensors.torch import load_file, save_file

    file = broken / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity.*--allow-nonfinite"):
        pack(broken, tmp_path / "store")
    with pytest.raises(CheckpointError, match=f"{name} does not fit int8"):
        pack(broken, tmp_path / "store", quant="int8", allow_nonfinite=True)
    pack(broken, tmp_path / "store", allow_nonfinite=True)
    assert not torch.isfinite(tensors[name]).all()
