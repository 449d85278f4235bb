"""Every way a store can be wrong has its own message, and is found before a byte of it is used."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer.errors import StoreError, StoreReadError
from flashinfer.store import open_store
from flashinfer.store.manifest import encode_manifest
from flashinfer.store.parse import decode_manifest
from tests.store.forging import Forge, forge, put
from tests.store_contents import manifest_of, values


def rename(kind: str, name: str) -> Forge:
    return lambda m: m[kind].update(name=name)


def overlap_tensors(m: dict[str, Any]) -> None:
    m["tensors"]["layers.0.attn.k.weight"]["offset"] = m["tensors"]["layers.0.attn.q.weight"]["offset"]


def overlap_layers(m: dict[str, Any]) -> None:
    m["layers"][1]["offset"] = m["layers"][0]["offset"]


def same_file_twice(m: dict[str, Any]) -> None:
    m["text"]["config.json"] = dict(m["dense"])


FORGED: dict[str, tuple[Forge, str]] = {
    "newer version": (put("version", 4), "version 4; this program reads up to 3: upgrade"),
    "version zero": (put("version", 0), "a positive integer"),
    "version text": (put("version", "1"), "a positive integer"),
    "version true": (put("version", True), "a positive integer"),
    "other format": (put("format", "something"), "not the manifest of a weight store"),
    "unknown key": (put("colour", "red"), "unknown field `colour`"),
    "unknown key inside": (put("layers/0/colour", "red"), r"unknown field `colour`.*layers"),
    "missing key": (lambda m: m.pop("neurons"), "missing required field `neurons`"),
    "wrong type": (put("alignment", "512"), "Expected `int`"),
    "path": (rename("dense", "../x"), "'../x' leaves the store's directory"),
    "absolute path": (rename("neurons", "/etc/passwd"), "leaves the store's directory"),
    "dot dot": (rename("dense", ".."), "leaves the store's directory"),
    "empty name": (rename("dense", ""), "leaves the store's directory"),
    "nul in name": (rename("dense", "a\0b"), "leaves the store's directory"),
    "newline in name": (rename("dense", "dense\n"), "leaves the store's directory"),
    "reserved name": (rename("dense", "manifest.json"), "reserved"),
    "text path": (lambda m: m["text"].update({"../evil": m["text"].pop("config.json")}), "plain file name"),
    "two entries one file": (same_file_twice, "two entries name the same file"),
    "negative file": (put("dense/bytes", -4096), "negative size"),
    "unaligned file": (put("dense/bytes", 4097), "boundary"),
    "no checksum": (put("dense/xxh3", "0"), "no checksum"),
    "alignment": (put("alignment", 768), "alignment 768"),
    "alignment zero": (put("alignment", 0), "alignment 0"),
    "no heads": (put("facts/num_heads", 0), "fact num_heads is 0"),
    "negative vocabulary": (put("facts/vocab_size", -1), "fact vocab_size is -1"),
    "uneven heads": (put("facts/num_kv_heads", 3), "evenly"),
    "odd rotary": (put("facts/rope/rotary_dim", 3), "rotary_dim 3"),
    "llama3 bands": (put("facts/rope/scaling", "llama3"), "bands"),
    "endless layers": (put("facts/num_layers", 10**15), "2 neuron layers"),
    "endless vocabulary": (put("facts/vocab_size", 10**15), "embed.weight has shape"),
    "unknown activation": (put("facts/activation", "tanh"), "tanh"),
    "unknown role": (lambda m: m["tensors"].update(extra=m["tensors"].pop("head.weight")), "unknown role 'extra'"),
    "missing tensor": (lambda m: m["tensors"].pop("layers.1.attn.q.weight"), "layers.1.attn.q.weight is missing"),
    "shape": (put("tensors/embed.weight/shape", [20, 15]), "embed.weight has shape"),
    "codec": (put("tensors/embed.weight/codec", "int3"), "unknown codec 'int3'"),
    "vector codec": (put("tensors/final_norm.weight/codec", "f16"), "f32 was expected"),
    "order codec": (put("tensors/layers.0.ffn.order/codec", "f32"), "i32 was expected"),
    "tensor size": (put("tensors/embed.weight/bytes", 1), "embed.weight has 1 bytes"),
    "tensor outside": (put("tensors/embed.weight/offset", 2**40), "embed.weight leaves"),
    "tensor before": (put("tensors/embed.weight/offset", -4096), "embed.weight leaves"),
    "tensor unaligned": (put("tensors/embed.weight/offset", 64), "not aligned to 4096"),
    "tensors overlap": (overlap_tensors, "overlap"),
    "layers overlap": (overlap_layers, "overlap"),
    "origin": (lambda m: m.update(origins={"x": {"scheme": "gptq", "kept": True}}), "an origin of 'x'"),
    "layer missing": (lambda m: m["layers"].pop(), "1 neuron layers"),
    "neurons": (put("layers/0/neurons", 20), "20 neurons"),
    "no bundles": (put("layers/0/bundles_per_record", 0), "empty records"),
    "record unaligned": (put("layers/0/record_bytes", 513), "record size 513"),
    "record small": (put("layers/0/bundles_per_record", 100), "do not fit"),
    "records": (put("layers/0/records", 2**62), "records for its neurons"),
    "region size": (put("layers/0/bytes", 1), "1 bytes for"),
    "region unaligned": (put("layers/1/offset", 512), "offset 512 is not aligned"),
    "region outside": (put("layers/1/offset", 2**50), "leaves"),
    "parts": (lambda m: m["layers"][0]["parts"].reverse(), "were expected"),
    "part offset": (put("layers/0/parts/1/offset", 0), "not where the one before ends"),
    "part elements": (put("layers/0/parts/0/elements", 15), "15 values"),
    "bundle size": (put("layers/0/bundle_bytes", 1), "bundle of 1 bytes"),
    "no permutation": (lambda m: m["tensors"].pop("layers.0.ffn.order"), r"layers\.0\.ffn\.order is missing"),
    "foreign permutation": (put("layers/0/permutation", "embed.weight"), r"unknown role 'layers\.0\.ffn\.order'"),
    "experts": (put("layers/0/experts", [[0, 3], [5, 6]]), "lists experts where facts have none"),
}


def test_the_store_itself_opens(store):
    assert open_store(store).manifest.facts.family == "llama"
    assert open_store(str(store)).root == store


@pytest.mark.parametrize("what", sorted(FORGED))
def test_forged_manifest(store, what):
    change, message = FORGED[what]
    forge(store, change)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(store)
    assert "\n" not in str(caught.value)
    assert str(store / "manifest.json") in str(caught.value) or "codec" in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' + b"[" * 100_000, b'{"version": 1e999}']
)
def test_a_manifest_that_is_none(store, data):
    (store / "manifest.json").write_bytes(data)
    with pytest.raises(StoreError, match=re.escape(str(store / "manifest.json"))):
        open_store(store)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_numbers_never_crash(store, data):
    """Any number anywhere in the manifest: it opens, or it is a StoreError."""
    m = manifest_of(store)
    places = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                walk(value)
            elif isinstance(value, int | float):
                places.append((node, key))

    walk(m)
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.sampled_from([0, 1, -1]))
    try:
        decode_manifest(json.dumps(m).encode(), "m")
    except StoreError:
        return


def test_encode_is_the_inverse_of_decode(store):
    data = (store / "manifest.json").read_bytes()
    assert encode_manifest(decode_manifest(data, "m")) == data


@pytest.mark.parametrize("kind", ["dense", "neurons"])
@pytest.mark.parametrize("size", [0, 4096, -1, +1])
def test_a_file_of_another_size(store, kind, size):
    path = store / manifest_of(store)[kind]["name"]
    data = path.read_bytes()
    path.write_bytes(data + b"x" if size == 1 else data[:size])
    with pytest.raises(StoreError, match=rf"{path.name} has .* the manifest says {len(data)}"):
        open_store(store)


def test_a_missing_file(store):
    path = store / manifest_of(store)["neurons"]["name"]
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        open_store(store)


@pytest.mark.parametrize("name", ["manifest", "dense"])
def test_symbolic_links_are_refused(store, tmp_path, name):
    path = store / ("manifest.json" if name == "manifest" else manifest_of(store)["dense"]["name"])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"{path.name} is a symbolic link"):
        open_store(store)


def test_a_directory_in_place_of_a_file(store):
    path = store / manifest_of(store)["dense"]["name"]
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        open_store(store)


def test_half_written(store):
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no manifest\.json.*half written"):
        open_store(store)


def test_not_a_store(tmp_path, checkpoint):
    with pytest.raises(StoreError, match="is a checkpoint, not a weight store: run `flashinfer pack"):
        open_store(checkpoint)
    with pytest.raises(StoreError, match="does not exist; make a store"):
        open_store(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"hub name.*huggingface-cli download org/model"):
        open_store("org/model")
    with pytest.raises(StoreError, match="is a file"):
        open_store(checkpoint / "config.json")


def test_files_the_manifest_does_not_name_are_ignored(store):
    (store / "note.txt").write_text("mine")
    assert open_store(store)


def test_geometry_reads_the_permutation(store, permutations):
    opened = open_store(store)
    for i, order in enumerate(permutations):
        geometry = opened.geometry(i)
        assert geometry.positions(np.arange(21)).tolist() == np.argsort(order).tolist()
        assert geometry.records == opened.manifest.layers[i].records


def test_a_permutation_that_is_none(store):
    m = manifest_of(store)
    with (store / m["dense"]["name"]).open("r+b") as f:
        f.seek(m["tensors"]["layers.1.ffn.order"]["offset"])
        f.write(b"\x03\x00\x00\x00" * 2)
    with pytest.raises(StoreError, match=r"layers\.1\.ffn\.order is not a permutation"):
        open_store(store).geometry(1)
    assert open_store(store).geometry(0)


def test_read_tensor(store):
    opened = open_store(store)
    m = manifest_of(store)
    data = (store / m["dense"]["name"]).read_bytes()
    for role, t in m["tensors"].items():
        if t["codec"] == "f32":
            expected = values(data[t["offset"] : t["offset"] + t["bytes"]], "f32").reshape(t["shape"])
            assert (opened.read_tensor(role) == expected).all()


def test_a_file_cut_after_opening(store):
    opened = open_store(store)
    path = opened.path_of(opened.manifest.dense)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(StoreReadError, match="ends after 0 bytes"):
        opened.read_tensor("embed.weight")
