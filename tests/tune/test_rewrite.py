"""A rewritten store is, byte for byte, the one that packing the checkpoint with those options makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.make_checkpoint import make_checkpoint
from flashinfer.errors import StoreError
from flashinfer.pack import pack
from flashinfer.store import Store, StoreUpdate, neurons, open_store, verify
from flashinfer.tune import gather
from flashinfer.tune.rewrite import plan_rewrite, rewrite
from tests.checkpoints import make_llama
from tests.plain_checkpoint import LLAMA, OPT, fill, llama_shapes, opt_shapes, write_checkpoint
from tests.store.predicted import add_predictors
from tests.store_contents import checkpoint_tensors, manifest_of, read_back

NEURONS = 21
REVERSED = list(range(NEURONS - 1, -1, -1))


def rewritten(store: Store, **options: Any) -> Store:
    """The store after a committed rewrite."""
    with StoreUpdate(store, need=plan_rewrite(store.manifest, **options).need) as update:
        update.commit(rewrite(store, update, **options))
    return open_store(store.root)


def assert_same_store(one: Path, two: Path) -> None:
    """The same files with the same bytes, and a manifest that says the same in the same order."""
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


@st.composite
def arrangements(draw: st.DrawFn) -> dict[str, Any]:
    """How a store may be packed: options of `pack`."""
    permuted = draw(st.booleans())
    return {
        "decision": draw(st.sampled_from(["separate", "bundled"])),
        "bundles_per_record": draw(st.sampled_from([None, 1, 2, 5, NEURONS])),
        "permutation": [draw(st.permutations(range(NEURONS))) for _ in range(2)] if permuted else None,
    }


def to_rewrite(arrangement: dict[str, Any]) -> dict[str, Any]:
    """The same as options of `rewrite`."""
    options = dict(arrangement)
    return options | {"orders": options.pop("permutation") or [None, None]}


def made(folder: Path, family: str, dtypes: str) -> Path:
    """A plain checkpoint; `dtypes` is a codec, or `mixed`, where neighbours differ. Llama has FFN biases, too."""
    config = OPT if family == "opt" else LLAMA | {"mlp_bias": True}
    shapes = opt_shapes(config) if family == "opt" else llama_shapes(config)
    if family == "llama":
        for i in range(2):
            shapes |= {f"model.layers.{i}.mlp.{n}_proj.bias": (NEURONS,) for n in ("gate", "up")}
            shapes[f"model.layers.{i}.mlp.down_proj.bias"] = (16,)
    named = {
        n: ("f32", "f16", "bf16")[k % 3] if len(shape) > 1 else "f32" for k, (n, shape) in enumerate(shapes.items())
    }
    return write_checkpoint(folder, config, fill(shapes), named if dtypes == "mixed" else dtypes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["llama", "opt"]),
    st.sampled_from(["f32", "f16", "bf16", "mixed"]),
    arrangements(),
    arrangements(),
    st.sampled_from([512, 4096]),
    st.sampled_from([700, 1 << 24]),
)
def test_any_arrangement_to_any_other(tmp_path_factory, family, dtypes, before, after, alignment, block):
    folder = tmp_path_factory.mktemp("rewrite")
    checkpoint = made(folder / "checkpoint", family, dtypes)
    pack(checkpoint, folder / "store", alignment=alignment, **before)
    pack(checkpoint, folder / "fresh", alignment=alignment, **after)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((gather, "PACK_BLOCK"), (neurons, "PACK_BLOCK"), (gather, "COPY_CHUNK")):
            patch.setattr(module, name, block)
        rewritten(open_store(folder / "store"), **to_rewrite(after))
    assert_same_store(folder / "store", folder / "fresh")
    shutil.rmtree(folder)


@pytest.mark.parametrize("after", ["separate", "bundled"])
@pytest.mark.parametrize("before", ["separate", "bundled"])
def test_every_weight_is_the_checkpoints(tmp_path, before, after):
    """By an oracle that has none of the package's code, on weights that are not made of arithmetic."""
    checkpoint = make_llama(tmp_path / "checkpoint", dtype="bfloat16", mlp_bias=True, intermediate_size=131)
    rng = np.random.default_rng(3)
    pack(checkpoint, tmp_path / "store", decision=before, permutation=[rng.permutation(131) for _ in range(3)])
    orders = [rng.permutation(131), None, rng.permutation(131)]
    opened = rewritten(open_store(tmp_path / "store"), decision=after, orders=orders, bundles_per_record=[1, 7, 131])
    found, expected = read_back(tmp_path / "store"), checkpoint_tensors(checkpoint)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    assert verify(opened) == []
    layers = opened.manifest.layers
    assert [n.bundles_per_record for n in layers] == [1, 7, 131]
    assert [n.permutation for n in layers] == ["layers.0.ffn.order", None, "layers.2.ffn.order"]
    assert all(n.decision == after for n in layers)


def test_there_and_back(tmp_path):
    pack(write_checkpoint(tmp_path / "c", OPT), tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    there = rewritten(open_store(tmp_path / "store"), decision="bundled", orders=[REVERSED, REVERSED])
    assert there.manifest.neurons.name not in {p.name for p in (tmp_path / "copy").iterdir()}
    rewritten(there, decision="separate", orders=[None, None])
    assert_same_store(tmp_path / "store", tmp_path / "copy")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    pack(write_checkpoint(tmp_path / "checkpoint", OPT), tmp_path / "store", bundles_per_record=4)
    return open_store(tmp_path / "store")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("layers.1.attn.q.weight", "tensor layers.1.attn.q.weight of .*dense-"),
        ("layers.1.ffn.up.weight", "tensor layers.1.ffn.up.weight of .*dense-"),
        ("layers.0.ffn.up.bias", "tensor layers.0.ffn.up.bias of .*dense-"),
        (1, r"layer 1 \(neurons\) of .*neurons-"),
    ],
)
def test_damage_never_gets_a_checksum_of_its_own(store, where, what):
    """The copy of a damaged byte would verify for ever."""
    m = store.manifest
    if isinstance(where, int):
        flip(store.path_of(m.neurons), m.layers[where].offset + 5)
    else:
        flip(store.path_of(m.dense), m.tensors[where].offset + 5)
    names = {p.name for p in store.root.iterdir()}
    with pytest.raises(StoreError, match=f"{what}.* does not match its checksum.*pack it again"):
        rewritten(store, decision="bundled", orders=[None, None])
    assert {p.name for p in store.root.iterdir()} == names
    assert open_store(store.root).manifest == m


@pytest.mark.parametrize("which", ["dense", "neurons"])
def test_a_file_that_was_cut(store, which):
    path = store.path_of(getattr(store.manifest, which))
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StoreError, match=f"{path.name} failed: the file ends"):
        rewritten(store, decision="bundled", orders=[None, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": [None]}, "1 orders for 2 layers"),
        ({"orders": [None, [0] * NEURONS]}, "order of layer 1 does not name each neuron once"),
        ({"orders": [range(20), None]}, "order of layer 0"),
        ({"bundles_per_record": 0}, "bundles per record 0 is not from 1 to 21"),
        ({"bundles_per_record": [1, 22]}, "bundles per record 22"),
        ({"bundles_per_record": [1]}, "1 counts of bundles per record for 2 layers"),
    ],
)
def test_options_that_cannot_be(store, options, message):
    with pytest.raises(StoreError, match=message):
        rewritten(store, **({"decision": "bundled", "orders": [None, None]} | options))
    assert open_store(store.root) == store


def test_predictors_are_kept_or_dropped(store):
    opened = add_predictors(store)
    m = opened.manifest
    moved = {"decision": "separate", "orders": [REVERSED, None]}
    kept = rewritten(opened, keep_predictors=True, **moved).manifest
    assert (kept.predictors, kept.sections) == (m.predictors, m.sections)
    assert {r: t for r, t in kept.tensors.items() if t.file == "predictors"} == {
        r: t for r, t in m.tensors.items() if t.file == "predictors"
    }
    assert verify(open_store(store.root)) == []
    bare = rewritten(open_store(store.root), **moved).manifest
    assert (bare.predictors, bare.sections, bare.predictor_bytes()) == (None, {}, 0)


def test_sketches_need_the_bundles(store):
    opened = add_predictors(rewritten(store, decision="bundled", orders=[None, None]))
    with pytest.raises(StoreError, match="a sketch belongs to a decision matrix in the bundles"):
        rewritten(opened, decision="separate", orders=[None, None], keep_predictors=True)
    again = rewritten(opened, decision="bundled", orders=[REVERSED, None], keep_predictors=True)
    assert again.manifest.predictors == opened.manifest.predictors
    assert rewritten(again, decision="separate", orders=[None, None]).manifest.predictors is None


def test_need_and_progress(store):
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"decision": "bundled", "orders": [REVERSED, None]}
    plan = plan_rewrite(store.manifest, **options)
    with StoreUpdate(store, need=plan.need) as update:
        before = {p.name for p in store.root.iterdir()}
        manifest = rewrite(store, update, progress=lambda done, total: seen.append((done, total)), **options)
        made = [p.stat().st_size for p in store.root.iterdir() if p.name not in before]
        update.commit(manifest)
    made.append((store.root / "manifest.json").stat().st_size)
    assert sum(-(-size // 4096) * 4096 for size in made) == plan.need
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)
    assert manifest.text == store.manifest.text


def test_version_1_becomes_version_2(store):
    m = manifest_of(store.root)
    for t in m["tensors"].values():
        del t["file"]
    del m["predictors"]
    (store.root / "manifest.json").write_text(json.dumps(m | {"version": 1}))
    rewritten(open_store(store.root), decision="bundled", orders=[None, None])
    pack(store.root.parent / "checkpoint", store.root.parent / "fresh", decision="bundled")
    assert_same_store(store.root, store.root.parent / "fresh")


CHILD = """
import sys
from pathlib import Path
import numpy as np
from flashinfer.store import StoreUpdate, open_store
from flashinfer.tune.rewrite import rewrite

store = open_store(sys.argv[1])
neurons, layers = store.manifest.facts.intermediate_size, store.manifest.facts.num_layers
before = Path("/proc/self/status").read_text()
with StoreUpdate(store) as update:
    update.commit(rewrite(store, update, decision="bundled", orders=[np.arange(neurons)[::-1]] * layers))
for text in (before, Path("/proc/self/status").read_text()):
    print(next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process takes")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Much less than the 150 MB that are moved."""
    make_checkpoint(tmp_path / "checkpoint", family="opt", size=150_000_000, dtype="f16")
    pack(tmp_path / "checkpoint", tmp_path / "store")
    shutil.rmtree(tmp_path / "checkpoint")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "store")], capture_output=True, text=True, check=True, cwd=root
    )
    before, after = (int(line) * 1024 for line in done.stdout.split())
    assert after - before < 80 * 1024 * 1024
    assert open_store(tmp_path / "store").manifest.layers[0].decision == "bundled"
