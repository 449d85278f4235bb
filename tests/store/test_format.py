"""What docs/format.md says of the bytes, checked on a packed store without the package's reading code."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import xxhash

from flashinfer.pack import pack
from tests.plain_checkpoint import OPT, write_checkpoint
from tests.store_contents import manifest_of


@pytest.fixture
def dense(store):
    m = manifest_of(store)
    return m, (store / m["dense"]["name"]).read_bytes()


def test_the_safetensors_library_opens_the_dense_file(store):
    from safetensors.numpy import load_file

    m = manifest_of(store)
    tensors = load_file(store / m["dense"]["name"])
    named = {name for name in tensors if not name.startswith("padding.")}
    assert named == set(m["tensors"])
    for role, t in m["tensors"].items():
        assert list(tensors[role].shape) == t["shape"]
        assert tensors[role].nbytes == t["bytes"]
    for name in set(tensors) - named:
        assert tensors[name].dtype == np.uint8
        assert not tensors[name].any()


def test_dense_alignment(dense):
    m, data = dense
    header = int.from_bytes(data[:8], "little")
    assert (8 + header) % 4096 == 0
    assert data[8 : 8 + header].rstrip(b" ").endswith(b"}")
    assert len(data) % 4096 == 0
    for t in m["tensors"].values():
        assert t["offset"] % (4096 if len(t["shape"]) == 2 else 64) == 0
    table = json.loads(data[8 : 8 + header])
    assert {r: 8 + header + table[r]["data_offsets"][0] for r in m["tensors"]} == {
        r: t["offset"] for r, t in m["tensors"].items()
    }


def test_dense_order_is_the_order_of_use(tmp_path):
    reverse = list(range(20, -1, -1))
    pack(write_checkpoint(tmp_path / "c", OPT), tmp_path / "s", permutation=[reverse, reverse])
    tensors = manifest_of(tmp_path / "s")["tensors"]
    roles = sorted(tensors, key=lambda r: tensors[r]["offset"])
    layer = ["attn.norm.weight", "attn.norm.bias"]
    layer += [f"attn.{n}.{part}" for n in "qkvo" for part in ("weight", "bias")]
    layer += ["ffn.norm.weight", "ffn.norm.bias", "ffn.up.weight", "ffn.up.bias", "ffn.down.bias", "ffn.order"]
    assert roles == [
        *("embed.weight", "embed.positions", "project_in.weight"),
        *(f"layers.{i}.{role}" for i in range(2) for role in layer),
        *("final_norm.weight", "final_norm.bias", "project_out.weight"),
    ]


def test_every_tensor_and_region_has_its_checksum(store, dense):
    m, data = dense
    for t in m["tensors"].values():
        assert xxhash.xxh3_128_hexdigest(data[t["offset"] : t["offset"] + t["bytes"]]) == t["xxh3"]
    neurons = (store / m["neurons"]["name"]).read_bytes()
    for n in m["layers"]:
        assert xxhash.xxh3_128_hexdigest(neurons[n["offset"] : n["offset"] + n["bytes"]]) == n["xxh3"]


def test_neuron_file_padding_is_zero(store):
    m = manifest_of(store)
    data = np.fromfile(store / m["neurons"]["name"], np.uint8)
    used = np.zeros(len(data), bool)
    for n in m["layers"]:
        assert n["offset"] % 4096 == 0
        for p in range(n["neurons"]):
            record, place = divmod(p, n["bundles_per_record"])
            at = n["offset"] + record * n["record_bytes"] + place * n["bundle_bytes"]
            used[at : at + n["bundle_bytes"]] = True
    assert len(data) % 4096 == 0
    assert used.sum() == sum(n["neurons"] * n["bundle_bytes"] for n in m["layers"])
    assert not data[~used].any()


def test_text_files_are_those_of_the_checkpoint(store, checkpoint):
    text = manifest_of(store)["text"]
    assert set(text) == {"config.json", "generation_config.json"}
    for name, f in text.items():
        assert f["name"] == f"text-{f['xxh3'][:16]}-{name}"
        assert (store / f["name"]).read_bytes() == (checkpoint / name).read_bytes()


def test_readable_by_others(store):
    umask = os.umask(0)
    os.umask(umask)
    assert (store / "manifest.json").stat().st_mode & 0o777 == 0o644 & ~umask
