from __future__ import annotations

import pytest

from flashinfer.errors import StoreReadError
from flashinfer.store import open_store, verify
from tests.store.forging import flip
from tests.store_contents import manifest_of


def test_a_sound_store(store):
    seen = []
    assert verify(open_store(store), lambda done, total: seen.append((done, total))) == []
    total = sum(f.bytes for f in open_store(store).manifest.files())
    assert seen[-1] == (total, total)
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)


def test_each_tensor_is_found_by_name(store):
    m = manifest_of(store)
    path = store / m["dense"]["name"]
    for role, t in m["tensors"].items():
        flip(path, t["offset"] + t["bytes"] - 1)
        assert [d.region for d in verify(open_store(store))] == [f"tensor {role}"]
        flip(path, t["offset"] + t["bytes"] - 1)


def test_each_layer_is_found_by_name(store):
    m = manifest_of(store)
    for i, n in enumerate(m["layers"]):
        path = store / m["neurons"]["name"]
        flip(path, n["offset"])
        (damage,) = verify(open_store(store))
        assert damage.region == f"layer {i} (neurons)"
        assert (damage.offset, damage.length, damage.file) == (n["offset"], n["bytes"], path.name)
        flip(path, n["offset"])


def test_all_damage_is_listed_in_order(store):
    m = manifest_of(store)
    dense, neurons = store / m["dense"]["name"], store / m["neurons"]["name"]
    flip(neurons, m["layers"][1]["offset"])
    flip(dense, m["tensors"]["head.weight"]["offset"])
    flip(dense, m["tensors"]["embed.weight"]["offset"])
    text = store / m["text"]["config.json"]["name"]
    flip(text, 3)
    regions = [d.region for d in verify(open_store(store))]
    assert regions == ["tensor embed.weight", "tensor head.weight", "layer 1 (neurons)", f"file {text.name}"]


@pytest.mark.parametrize("offset", [20, -1])
def test_header_and_padding_belong_to_the_file(store, offset):
    path = store / manifest_of(store)["dense"]["name"]
    flip(path, offset)
    (damage,) = verify(open_store(store))
    assert damage.region == f"file {path.name}"


def test_an_unreadable_file(store):
    opened = open_store(store)
    opened.path_of(opened.manifest.neurons).unlink()
    with pytest.raises(StoreReadError, match="neurons-"):
        verify(opened)
