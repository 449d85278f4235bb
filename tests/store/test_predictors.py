"""What predictors add to a store: where it lies, what is checked of it, and in which order a token uses it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer.errors import StoreError
from flashinfer.store import open_store, use_order, verify
from flashinfer.store.manifest import encode_manifest
from flashinfer.store.parse import decode_manifest
from flashinfer.store.roles import all_roles, is_predictor, predictor_of
from tests.store.forging import Forge, flip, forge, put
from tests.store.predicted import RANK, tensors_for, values
from tests.store_contents import manifest_of

FFN = "layers.0.ffn"


def drop(*roles: str) -> Forge:
    def change(m: dict[str, Any]) -> None:
        for role in roles:
            m["tensors"].pop(role)

    return change


def moved(old: str, new: str) -> Forge:
    return lambda m: m["tensors"].update({new: m["tensors"].pop(old)})


def overlap(m: dict[str, Any]) -> None:
    m["tensors"][f"{FFN}.lowrank.b.weight"]["offset"] = m["tensors"][f"{FFN}.lowrank.a.weight"]["offset"]


def no_predictors(m: dict[str, Any]) -> None:
    m["predictors"] = None


def only_the_file(m: dict[str, Any]) -> None:
    m["tensors"] = {role: t for role, t in m["tensors"].items() if t["file"] == "dense"}


def sketch_in_f32(m: dict[str, Any]) -> None:
    m["tensors"][f"{FFN}.sketch.weight"].update(codec="f32", bytes=21 * 16 * 4)


def same_as_dense(m: dict[str, Any]) -> None:
    m["predictors"]["name"] = m["dense"]["name"]


FORGED: dict[str, tuple[Forge, str]] = {
    "version 1": (put("version", 1), "version 1 has no predictors"),
    "tensors without a file": (no_predictors, "go together"),
    "file without tensors": (only_the_file, "go together"),
    "path": (put("predictors/name", "../x"), "leaves the store's directory"),
    "the dense file": (same_as_dense, "two entries name the same file"),
    "unaligned file": (put("predictors/bytes", 4097), "boundary"),
    "unknown file": (put(f"tensors/{FFN}.threshold/file", "neurons"), "Invalid enum value 'neurons'"),
    "predictor in the dense file": (put(f"tensors/{FFN}.threshold/file", "dense"), "belongs in the predictors file"),
    "norm in the predictors file": (put(f"tensors/{FFN}.norm.weight/file", "predictors"), "belongs in the dense file"),
    "unknown part": (moved(f"{FFN}.threshold", f"{FFN}.threshold.weight"), "unknown role"),
    "unknown layer": (moved(f"{FFN}.threshold", "layers.2.ffn.threshold"), r"unknown role 'layers\.2"),
    "half a factor": (drop(f"{FFN}.lowrank.b.weight"), "layer 0 has some of its low-rank factors"),
    "no factor bias": (drop(f"{FFN}.lowrank.b.bias"), "layer 0 has some of its low-rank factors"),
    "rank": (put(f"tensors/{FFN}.lowrank.a.weight/shape", [31, 16]), "has rank 31, not a multiple of 32"),
    "rank zero": (put(f"tensors/{FFN}.lowrank.a.weight/shape", [0, 16]), "has rank 0"),
    "rank of nothing": (put(f"tensors/{FFN}.lowrank.a.weight/shape", []), "has rank 0"),
    "other rank": (put(f"tensors/{FFN}.lowrank.b.weight/shape", [21, 64]), r"shape \[21, 64\], not \[21, 32\]"),
    "factor of a vector": (put(f"tensors/{FFN}.lowrank.a.weight/shape", [32]), r"shape \[32\], not \[32, 16\]"),
    "factor of another width": (put(f"tensors/{FFN}.lowrank.a.weight/shape", [32, 8]), r"not \[32, 16\]"),
    "thresholds": (put(f"tensors/{FFN}.threshold/shape", [20]), r"shape \[20\], not \[21\]"),
    "threshold codec": (put(f"tensors/{FFN}.threshold/codec", "f16"), "f32 was expected"),
    "threshold bytes": (put(f"tensors/{FFN}.threshold/bytes", 80), "its shape needs 84"),
    "no slack": (drop(f"{FFN}.sketch.slack"), "a sketch without its slack"),
    "slack alone": (drop(f"{FFN}.sketch.weight"), "a sketch without its slack"),
    "no sketch bias": (drop(f"{FFN}.sketch.bias"), "copy of the decision's bias"),
    "bias without a sketch": (drop(f"{FFN}.sketch.weight", f"{FFN}.sketch.slack"), "copy of the decision's bias"),
    "sketch codec": (sketch_in_f32, "codec f32, int8g32 was expected"),
    "vector in int8g32": (put(f"tensors/{FFN}.sketch.slack/codec", "int8g32"), "f32 was expected"),
    "sketch bytes": (put(f"tensors/{FFN}.sketch.weight/bytes", 21 * 16), "its shape needs 714"),
    "outside": (put(f"tensors/{FFN}.sketch.weight/offset", 2**30), "leaves predictors-"),
    "unaligned": (put(f"tensors/{FFN}.sketch.weight/offset", 64), "not aligned to 4096"),
    "overlap": (overlap, "overlap"),
    "no checksum": (put(f"tensors/{FFN}.threshold/xxh3", "0"), "no checksum"),
    "section path": (put("sections/calibration/name", "../x"), "leaves the store's directory"),
}


@pytest.mark.parametrize("what", sorted(FORGED))
def test_forged(calibrated, what):
    change, message = FORGED[what]
    forge(calibrated, change)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(calibrated)
    assert "\n" not in str(caught.value)
    assert str(calibrated / "manifest.json") in str(caught.value)


def test_a_sketch_of_a_dense_decision_matrix(store, calibrated):
    m, with_sketch = manifest_of(store), manifest_of(calibrated)
    m["predictors"] = with_sketch["predictors"]
    for part in ("weight", "slack"):
        t = with_sketch["tensors"][f"{FFN}.sketch.{part}"]
        m["tensors"][f"{FFN}.sketch.{part}"] = t
    with pytest.raises(StoreError, match="a sketch of a decision matrix that is dense"):
        decode_manifest(json.dumps(m).encode(), "m")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_numbers_in_predictors_never_crash(calibrated, data):
    m = manifest_of(calibrated)
    tensor = m["tensors"][data.draw(st.sampled_from([role for role in m["tensors"] if is_predictor(role)]))]
    number = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 32])
    key = data.draw(st.sampled_from(["shape", "offset", "bytes"]))
    tensor[key] = data.draw(st.lists(number, max_size=3) if key == "shape" else number)
    try:
        decode_manifest(json.dumps(m).encode(), "m")
    except StoreError:
        return


def test_read_tensor_reads_the_right_file(calibrated):
    opened = open_store(calibrated)
    written = {t.role: b"".join(t.chunks()) for t in tensors_for(opened.manifest)}
    assert set(written) == {role for role in opened.manifest.tensors if is_predictor(role)}
    for role, data in written.items():
        assert opened.read_range(opened.manifest.predictors, opened.manifest.tensors[role].offset, len(data)) == data
    assert (opened.read_tensor("layers.1.ffn.lowrank.a.weight") == values(1, RANK, 16)).all()
    assert (opened.read_tensor("layers.1.ffn.threshold") == np.abs(values(4, 21))).all()
    sketch = opened.read_tensor("layers.1.ffn.sketch.weight")
    assert sketch.shape == (21, 16)
    assert np.abs(sketch - values(5, 21, 16)).max() < 0.01


def test_the_safetensors_library_opens_the_predictors_file(calibrated):
    from safetensors.numpy import load_file

    m = manifest_of(calibrated)
    tensors = load_file(calibrated / m["predictors"]["name"])
    assert {name for name in tensors if not name.startswith("padding.")} == {r for r in m["tensors"] if is_predictor(r)}
    assert (tensors["layers.0.ffn.lowrank.b.weight"] == values(1, 21, RANK).astype(np.float16)).all()
    sketch = tensors["layers.0.ffn.sketch.weight"]
    assert (sketch.dtype, sketch.shape) == (np.uint8, (21, 34))


def test_predictors_follow_the_norm_they_share_with_the_decision_matrix(calibrated):
    m = open_store(calibrated).manifest
    roles = use_order(m)
    assert sorted(roles) == sorted(m.tensors)
    ffn = [role.removeprefix("layers.1.ffn.") for role in roles if role.startswith("layers.1.ffn.")]
    assert ffn == [
        *("norm.weight", "norm.bias"),
        *("lowrank.a.weight", "lowrank.b.weight", "lowrank.b.bias"),
        *("sketch.weight", "sketch.slack", "sketch.bias", "threshold", "down.bias"),
    ]
    assert roles.index("layers.0.ffn.threshold") < roles.index("layers.1.attn.norm.weight")
    for file in ("dense", "predictors"):
        inside = [role for role in roles if m.tensors[role].file == file]
        assert inside == sorted(inside, key=lambda role: m.tensors[role].offset)


def test_the_permutation_comes_last_of_its_layer(store):
    m = open_store(store).manifest
    roles = use_order(m)
    assert roles.index("layers.0.ffn.gate.weight") < roles.index("layers.0.ffn.order")
    assert roles.index("layers.0.ffn.order") + 1 == roles.index("layers.1.attn.norm.weight")
    assert sorted(roles) == sorted(m.tensors)


def test_every_role_is_somebodys(calibrated):
    m = open_store(calibrated).manifest
    assert len(set(all_roles(m.facts))) == len(list(all_roles(m.facts)))
    owners = {role.split(".")[3]: predictor_of(role) for role in all_roles(m.facts) if is_predictor(role)}
    assert owners == {"lowrank": "low-rank", "sketch": "certified", "threshold": "threshold"}


def test_bytes_are_counted_apart(calibrated):
    m = open_store(calibrated).manifest
    without = [t for role, t in m.tensors.items() if not is_predictor(role)]
    assert m.weight_bytes() == sum(t.bytes for t in without) + sum(n.neurons * n.bundle_bytes for n in m.layers)
    assert m.predictor_bytes() == sum(len(b"".join(t.chunks())) for t in tensors_for(m))
    assert m.predictors in m.files()


@pytest.mark.parametrize("role", [f"{FFN}.sketch.weight", "layers.1.ffn.lowrank.b.bias"])
def test_verify_names_the_damaged_tensor(calibrated, role):
    m = open_store(calibrated).manifest
    assert m.predictors is not None
    flip(calibrated / m.predictors.name, m.tensors[role].offset)
    (damage,) = verify(open_store(calibrated))
    assert (damage.region, damage.file) == (f"tensor {role}", m.predictors.name)


def test_a_cut_predictors_file(calibrated):
    path = calibrated / manifest_of(calibrated)["predictors"]["name"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"predictors-.*the manifest says"):
        open_store(calibrated)


def test_the_manifest_survives_a_round_trip(calibrated):
    data = (calibrated / "manifest.json").read_bytes()
    assert encode_manifest(decode_manifest(data, "m")) == data
