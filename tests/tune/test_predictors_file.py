"""The predictors file: sketches made from a store, wherever its decision matrices lie, and tensors from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from flashinfer.errors import StoreError
from flashinfer.pack import pack
from flashinfer.quant import codec_named
from flashinfer.store import Store, StoreUpdate, open_store, verify
from flashinfer.tune import gather, sketch
from flashinfer.tune.rewrite import rewrite
from flashinfer.tune.sketch import (
    PredictorTensor,
    decision_blocks,
    predictors_size,
    sketch_rows,
    sketch_tensors,
    write_predictors,
)
from tests.plain_checkpoint import LLAMA, OPT, fill, llama_shapes, opt_shapes, write_checkpoint

F32 = npt.NDArray[np.float32]
NEURONS, HIDDEN = 21, 16


def made(folder: Path, family: str, **options: Any) -> Store:
    config = OPT if family == "opt" else LLAMA
    pack(write_checkpoint(folder / "checkpoint", config, dtypes="f16"), folder / "store", **options)
    return open_store(folder / "store")


def decision_of(family: str) -> tuple[list[F32], list[F32] | None]:
    """Decision matrix and bias of each layer, from the arithmetic the checkpoint is made of."""
    if family == "llama":
        tensors = fill(llama_shapes())
        return [tensors[f"model.layers.{i}.mlp.gate_proj.weight"] for i in range(2)], None
    tensors = fill(opt_shapes())
    at = [f"model.decoder.layers.{i}.fc1" for i in range(2)]
    return [tensors[f"{name}.weight"] for name in at], [tensors[f"{name}.bias"] for name in at]


PERMUTATION = [[(n * 8 + 3) % NEURONS for n in range(NEURONS)], list(range(NEURONS))]
ARRANGED: dict[str, dict[str, Any]] = {
    "separate": {},
    "bundled": {"decision": "bundled", "bundles_per_record": 4},
    "permuted": {"decision": "bundled", "bundles_per_record": 1, "permutation": PERMUTATION},
}


@pytest.fixture(params=[10, 1 << 20], ids=["small blocks", "large blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PACK_BLOCK", 50 * request.param)
    monkeypatch.setattr(sketch, "_PIECE", request.param)


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_decision_blocks(tmp_path, blocks, family, arranged):
    store = made(tmp_path, family, **ARRANGED[arranged])
    matrices, biases = decision_of(family)
    for layer in range(2):
        rows, added = zip(*decision_blocks(store, layer), strict=True)
        assert (np.concatenate(rows) == matrices[layer]).all()
        if biases is None:
            assert set(added) == {None}
        else:
            assert (np.concatenate(added) == biases[layer]).all()


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sketches_of_a_store(tmp_path, blocks, family, arranged):
    """The same from wherever the matrices lie; in one change with moving them into the bundles."""
    store = made(tmp_path, family, **ARRANGED[arranged])
    seen: list[tuple[int, int]] = []
    with StoreUpdate(store) as update:
        draft = rewrite(store, update, decision="bundled", orders=PERMUTATION)
        tensors = sketch_tensors(store)
        entry, entries = write_predictors(update, tensors, lambda done, total: seen.append((done, total)))
        assert entry.bytes == predictors_size(store.manifest.facts, tensors)
        update.commit(msgspec.structs.replace(draft, predictors=entry, tensors=draft.tensors | entries))
    opened = open_store(store.root)
    assert verify(opened) == []
    assert seen[-1][0] == seen[-1][1] == opened.manifest.predictor_bytes()
    matrices, biases = decision_of(family)
    for layer, matrix in enumerate(matrices):
        encoded, slack = sketch_rows(matrix)
        at = f"layers.{layer}.ffn.sketch"
        assert (opened.read_tensor(f"{at}.weight") == codec_named("int8g32").decode(encoded, HIDDEN)).all()
        assert (opened.read_tensor(f"{at}.slack") == slack).all()
        assert (f"{at}.bias" in opened.manifest.tensors) == (biases is not None)
        if biases is not None:
            assert (opened.read_tensor(f"{at}.bias") == biases[layer]).all()


@pytest.mark.parametrize("codec", ["int4g32", "int8", "fp8"])
def test_a_matrix_of_eight_bits_is_its_own_sketch(tmp_path, blocks, codec):
    store = made(tmp_path, "opt", quant=f"layers.*={codec}", decision="bundled")
    with StoreUpdate(store) as update:
        entry, entries = write_predictors(update, sketch_tensors(store))
        tensors = store.manifest.tensors | entries
        update.commit(msgspec.structs.replace(store.manifest, predictors=entry, tensors=tensors))
    opened = open_store(store.root)
    biases = decision_of("opt")[1]
    for layer in range(2):
        at = f"layers.{layer}.ffn.sketch"
        rows = np.concatenate([rows for rows, _ in decision_blocks(store, layer)])
        assert opened.manifest.tensors[f"{at}.weight"].codec == codec
        assert (opened.read_tensor(f"{at}.weight") == rows).all()
        assert not opened.read_tensor(f"{at}.slack").any()
        assert (opened.read_tensor(f"{at}.bias") == biases[layer]).all()


@pytest.mark.parametrize("arranged", ["separate", "bundled"])
def test_damage_is_never_sketched(tmp_path, arranged):
    store = made(tmp_path, "opt", **ARRANGED[arranged])
    m = store.manifest
    inside = arranged == "bundled"
    path = store.path_of(m.neurons if inside else m.dense)
    data = bytearray(path.read_bytes())
    data[m.layers[1].offset if inside else m.tensors["layers.1.ffn.up.weight"].offset] ^= 1
    path.write_bytes(data)
    with StoreUpdate(store) as update, pytest.raises(StoreError, match="does not match its checksum"):
        write_predictors(update, sketch_tensors(store))
    assert open_store(store.root).manifest == m


def test_tensors_go_in_the_order_of_use_whatever_the_order_given(tmp_path):
    store = made(tmp_path, "opt", decision="bundled")
    shutil.copytree(store.root, tmp_path / "other")
    lowrank = [
        PredictorTensor.of(f"layers.{i}.ffn.lowrank.{part}", np.full(shape, i + 0.5, np.float32), codec)
        for i in range(2)
        for part, shape, codec in (("b.bias", (NEURONS,), "f32"), ("b.weight", (NEURONS, 32), "bf16"),
                                   ("a.weight", (32, HIDDEN), "int8g32"))
    ]  # fmt: skip
    turned: Callable[[list[PredictorTensor]], list[PredictorTensor]] = lambda tensors: tensors[::-1]  # noqa: E731
    written = []
    for root, arrange in ((store.root, list), (tmp_path / "other", turned)):
        with StoreUpdate(open_store(root)) as update:
            entry, entries = write_predictors(update, arrange(lowrank))
            m = update.store.manifest
            update.commit(msgspec.structs.replace(m, predictors=entry, tensors=m.tensors | entries))
        written.append((entry, entries))
    assert written[0] == written[1]
    opened = open_store(store.root)
    assert (opened.read_tensor("layers.1.ffn.lowrank.b.weight") == 1.5).all()
    assert np.allclose(opened.read_tensor("layers.0.ffn.lowrank.a.weight"), 0.5, rtol=1e-3)
