"""`calibrate --quant llm.int8`: outlier columns found on a text, kept in the store, and given to the backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flashinfer.engine
from flashinfer import pack
from flashinfer.backend import open_backend
from flashinfer.engine import Model
from flashinfer.errors import StoreError
from flashinfer.pack import PackReport
from flashinfer.quant import LlmInt8, codec_named
from flashinfer.store import Store, StoreUpdate, open_store, verify
from flashinfer.store.check import check_manifest
from flashinfer.tune.outliers import Reached
from flashinfer.tune.perplexity import Protocol, perplexity
from flashinfer.tune.quantise import QuantReport
from flashinfer.tune.rewrite import rewrite
from tests.checkpoints import make_llama
from tests.tiny_tokenizers import tiny_sentencepiece
from tests.tune.calibrating import CONTEXT, SIZE, copy_of, token_ids
from tests.tune.test_quantise import OPTIONS, quantised

PLANTED = (7, 40)
RECIPE = "attn=llm.int8,layers.*.ffn.gate.weight=llm.int8"
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of which two columns of what the norms give are huge, as those of large models are."""
    folder = tmp_path_factory.mktemp("planted")
    checkpoint = make_llama(folder / "checkpoint", seed=3, intermediate_size=96, dtype="float16", **SIZE)
    tiny_sentencepiece(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, values in tensors.items():
        if any(f".{norm}." in name for norm in NORMS):
            values[:] = 0.5
            values[list(PLANTED)] = 60.0
        if ".v_proj." in name:
            values /= 100  # attention's own output is small
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    report: PackReport = pack(checkpoint, folder / "store")
    return report.path


@pytest.fixture(scope="module")
def made(planted: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, QuantReport]:
    """The same with `llm.int8`. Read only."""
    path = copy_of(planted, tmp_path_factory.mktemp("made") / "store")
    report = quantised(path, text, replace(OPTIONS, recipe=RECIPE))
    return open_store(path), report


def test_the_columns_are_found(made: tuple[Store, QuantReport]) -> None:
    """Those of what comes out of attention are not large: o is int8."""
    store, report = made
    sets = {role: store.read_tensor(role).tolist() for role in store.manifest.tensors if role.endswith(".outliers")}
    assert sets == {f"layers.{i}.{part}.outliers": list(PLANTED) for i in range(2) for part in ("attn", "ffn")}
    assert verify(store) == []
    assert report.codecs["layers.0.attn.o.weight"] == "int8"
    assert (
        report.codecs["layers.1.attn.k.weight"] == store.manifest.tensors["layers.1.attn.k.weight"].codec == "llm.int8"
    )


@pytest.mark.parametrize("part", ["attn.q", "attn.v", "ffn.gate"])
def test_it_loses_less_than_int8(part: str, made: tuple[Store, QuantReport], planted: Path) -> None:
    """On inputs with such columns; at all others it is int8."""
    role = f"layers.1.{part}.weight"
    original, found = (store.read_tensor(role) for store in (open_store(planted), made[0]))
    int8 = codec_named("int8").decode(codec_named("int8").encode(original), original.shape[1])
    assert np.array_equal(found[:, PLANTED], original[:, PLANTED])
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    x[:, PLANTED] *= 60
    ours, theirs = (float(np.square(x @ (original - q).T).sum()) for q in (found, int8))
    assert ours < 0.05 * theirs


def test_the_backend_is_told(made: tuple[Store, QuantReport], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix comes with its own columns, and the model is what was judged."""
    store, report = made
    told = []

    def listening(*arguments: Any) -> Any:
        backend = open_backend(*arguments)
        inner = backend.matrix

        def matrix(raw: Any, codec: Any, rows: int, cols: int, *, keep: bool) -> Any:
            told.append(codec)
            return inner(raw, codec, rows, cols, keep=keep)

        monkeypatch.setattr(backend, "matrix", matrix)
        return backend

    monkeypatch.setattr(flashinfer.engine, "open_backend", listening)
    ids = np.array(token_ids(store.root, text)[OPTIONS.tokens : OPTIONS.tokens + OPTIONS.held_out])
    with Model.open(store, context=CONTEXT) as model:
        found = perplexity(model, ids, Protocol(CONTEXT, CONTEXT - 1, 1)).perplexity
    assert found == pytest.approx(report.after, rel=1e-4)
    assert {codec.outliers for codec in told if isinstance(codec, LlmInt8)} == {PLANTED}


def test_a_rewrite_keeps_them(made: tuple[Store, QuantReport], tmp_path: Path) -> None:
    store = open_store(copy_of(made[0].root, tmp_path / "store"))
    with StoreUpdate(store) as update:
        update.commit(rewrite(store, update, decision="separate", orders=[list(range(95, -1, -1))] * 2))
    again = open_store(store.root)
    assert verify(again) == []
    for role, t in store.manifest.tensors.items():
        assert again.manifest.tensors[role].xxh3 == t.xxh3
        assert np.array_equal(again.read_tensor(role), made[0].read_tensor(role))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.0.attn.outliers"), "its outlier columns"),
        (lambda t: t.update({"layers.0.attn.o.outliers": t["layers.0.attn.outliers"]}), "columns of no matrix"),
        (lambda t: t.update({"embed.weight": msgspec.structs.replace(t["embed.weight"], codec="llm.int8")}), "cannot"),
        (
            lambda t: t.update(
                {"layers.0.ffn.outliers": msgspec.structs.replace(t["layers.0.ffn.outliers"], shape=(65,), bytes=260)}
            ),
            "for 64 columns",
        ),
        (
            lambda t: t.update(
                {"layers.0.ffn.outliers": msgspec.structs.replace(t["layers.0.ffn.outliers"], codec="f32")}
            ),
            "i32 was expected",
        ),
    ],
)
def test_manifests_that_cannot_be(change: Any, said: str, made: tuple[Store, QuantReport]) -> None:
    tensors = dict(made[0].manifest.tensors)
    check_manifest(msgspec.structs.replace(made[0].manifest, tensors=dict(tensors)), "here")
    change(tensors)
    with pytest.raises(StoreError, match=said):
        check_manifest(msgspec.structs.replace(made[0].manifest, tensors=tensors), "here")


@pytest.mark.parametrize("columns", [(40, 7), (7, 64), (-1, 7)])
def test_columns_that_cannot_be(columns: tuple[int, int], made: tuple[Store, QuantReport], tmp_path: Path) -> None:
    store = open_store(copy_of(made[0].root, tmp_path / "store"))
    t = store.manifest.tensors["layers.0.ffn.outliers"]
    path = store.path_of(store.manifest.dense)
    data = bytearray(path.read_bytes())
    data[t.offset : t.offset + t.bytes] = np.array(columns, dtype="<i4").tobytes()
    path.write_bytes(data)
    with pytest.raises(StoreError, match="not ascending columns below 64"):
        store.read_tensor("layers.0.ffn.gate.weight")


def test_large_often_enough() -> None:
    """In 6 of 100 tokens, of either sign; and not where most columns are."""
    reached, x = Reached(), np.zeros((100, 16), dtype=np.float32)
    x[:6, 1], x[:5, 2], x[94:, 3] = -6.0, 6.0, 6.5
    reached("a", x[:50])
    reached("a", x[50:])
    assert reached.outliers("a") == (1, 3)
    reached("b", x + 7)
    assert reached.outliers("b") == ()
