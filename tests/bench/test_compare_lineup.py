"""Who runs and who is left out, for what was given; which GGUF file fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_struct

import flashinfer
from flashinfer.bench.compare.contenders import LADDER, NAMES, OTHERS
from flashinfer.bench.compare.gguf_files import GgufFiles, best_that_fits, plan_files, quant_of
from flashinfer.bench.compare.lineup import Carries, Given, Lineup, carries, default_predictor, line_up
from flashinfer.bench.compare.ours import halved, run_of
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import PeerError
from flashinfer.memory import Request, resolve
from flashinfer.pack import pack
from flashinfer.store import Manifest, open_store

STORE, PACKED, HF = Path("cal.flash"), Path("packed.flash"), Path("hf")
CALIBRATED = Carries(STORE, frozenset({"certified", "low-rank"}), sparse=True, bundled=True)
PLAIN = Carries(PACKED, frozenset(), sparse=True, bundled=False)
DENSE = Carries(STORE, frozenset({"threshold"}), sparse=False, bundled=False)
MODULES = frozenset({"llama_cpp", "gguf", "accelerate", "transformers", "torch", "airllm"})
FULL, Q8, Q4 = Path("m.gguf"), Path("m-q8_0.gguf"), Path("m-q4_0.gguf")
SIZES = {FULL: 7000, Q8: 3500, Q4: 2000}
SPARSE = Given(CALIBRATED, PLAIN, (1000,), "low-rank", "python")
PEERED = replace(SPARSE, checkpoint=HF, gguf=GgufFiles(FULL, (Q8, Q4), ()), sizes=SIZES, modules=MODULES, room=10_000)


def models(lineup: Lineup) -> dict[str, Path]:
    return {c.name: c.model for c in lineup.contenders}


def test_the_whole_ladder_and_the_other_predictors() -> None:
    found = line_up(SPARSE)
    assert models(found) == {
        "naive": PACKED, "hybrid": PACKED, "predictor": STORE, "window": STORE, "bundled": STORE, "native": STORE,
        "exact": PACKED, "certified": STORE, "low-rank+lookahead": STORE,
    }  # fmt: skip
    assert [c.predictor for c in found.contenders] == ["all"] * 2 + ["low-rank"] * 4 + [
        "exact",
        "certified",
        "low-rank",
    ]
    assert found.notes == [
        "predictor, window: on the calibrated store, read part by part; the packed one has no low-rank predictor."
    ]
    assert found.left_out["low-rank"] == "it is `native` here"
    assert set(models(found)) | set(found.left_out) == set(NAMES)


def test_without_the_packed_store_the_lower_rungs_are_left_out() -> None:
    found = line_up(replace(SPARSE, packed=None))
    assert list(models(found)) == ["bundled", "native", "certified", "low-rank+lookahead"]
    for name in ("naive", "hybrid", "predictor", "window"):
        assert "--packed" in found.left_out[name]
    assert found.left_out["exact"].startswith("its decision matrix lies in the bundles: give --packed")
    assert found.left_out["threshold"].startswith("this store has no threshold predictor")


def test_exact_selection_by_a_matrix_that_lies_in_bundles_is_left_to_others() -> None:
    found = line_up(replace(SPARSE, predictor="exact"))
    assert list(models(found)) == [
        "naive",
        "hybrid",
        "predictor",
        "window",
        "certified",
        "low-rank",
        "low-rank+lookahead",
    ]
    assert models(found)["window"] == PACKED
    assert "compare certified" in found.left_out["native"]


def test_a_packed_store_that_has_the_predictor_is_used() -> None:
    found = line_up(replace(SPARSE, packed=replace(CALIBRATED, path=PACKED)))
    assert models(found)["window"] == PACKED
    assert found.notes == []


def test_nothing_is_selected_in_a_dense_model() -> None:
    found = line_up(Given(DENSE, replace(DENSE, path=PACKED), (1000,), "exact", "python"))
    assert list(models(found)) == ["naive", "hybrid", "native", "threshold"]
    assert found.left_out["window"] == "the exact predictor leaves out no neuron of this model"
    found = line_up(Given(DENSE, replace(DENSE, path=PACKED), (1000,), "threshold", "python"))
    assert list(models(found)) == ["naive", "hybrid", "predictor", "window", "bundled", "native"]


def test_of_a_mixture_the_router_says_who_is_needed() -> None:
    routed = Carries(STORE, frozenset({"router"}), sparse=False, bundled=True)
    found = line_up(Given(routed, routed, (1000,), default_predictor(routed), "python"))
    assert {c.name: c.predictor for c in found.contenders} == {
        "naive": "all", "hybrid": "all", "bundled": "router", "native": "router", "router+lookahead": "router",
    }  # fmt: skip
    assert "neurons of an expert are needed together" in found.left_out["window"]
    for name in ("exact", "certified", "low-rank", "low-rank+lookahead", "threshold"):
        assert "is for dense models: of a mixture of experts the router" in found.left_out[name]
    assert line_up(SPARSE).left_out["router+lookahead"] == "this model is dense: it has no router"


def test_lookahead_runs_at_the_ladders_level() -> None:
    found = {c.name: c.predictor for c in line_up(replace(SPARSE, predictor="low-rank:0.99")).contenders}
    assert (found["native"], found["low-rank"], found["low-rank+lookahead"]) == (
        "low-rank:0.99", "low-rank", "low-rank:0.99",
    )  # fmt: skip


def test_without_a_native_core_only_torch_runs() -> None:
    found = line_up(replace(SPARSE, native=False))
    assert list(models(found)) == ["naive", "hybrid", "predictor", "window", "bundled"]
    assert found.left_out["native"] == "this installation has no native core"


def test_everybody_at_once_and_llama_cpp_computes_silu() -> None:
    found = line_up(replace(PEERED, caps=(2500, 4000)))
    peers = [c for c in found.contenders if c.rung is None]
    assert [(c.name, c.model, c.comparable, c.capped, c.caps) for c in peers] == [
        ("llama.cpp", FULL, False, True, None), ("llama.cpp-ram", FULL, False, False, None),
        ("accelerate", HF, True, True, None), ("airllm", HF, True, True, None), ("loop", HF, True, True, None),
        ("llama.cpp-q4_0", Q4, False, True, frozenset({2500})), ("llama.cpp-q8_0", Q8, False, True, frozenset({4000})),
    ]  # fmt: skip
    assert found.notes[-1].startswith(
        "llama.cpp, llama.cpp-ram, llama.cpp-q4_0, llama.cpp-q8_0: llama.cpp has no llama"
    )


def test_a_stand_in_is_compared_in_nothing_but_time() -> None:
    found = line_up(replace(PEERED, store=DENSE, packed=None, predictor="exact", stand_in=True))
    assert not any(c.comparable for c in found.contenders if c.rung is None)
    assert "another checkpoint of the same shape stands in" in found.notes[-1]
    found = line_up(replace(PEERED, store=DENSE, packed=None, predictor="exact"))
    assert all(c.comparable for c in found.contenders)


def test_peers_are_left_out_for_want_of_modules_and_inputs() -> None:
    found = line_up(replace(PEERED, modules=frozenset({"torch"})))
    assert "loop" in models(found)
    assert found.left_out["llama.cpp"].startswith(
        "no llama_cpp in that Python: pip install 'flashinfer-offload[bench]'"
    )
    assert found.left_out["accelerate"].startswith("no accelerate in")
    assert found.left_out["llama.cpp-quantised"].startswith("no llama_cpp in")
    found = line_up(SPARSE)
    assert found.left_out["llama.cpp"] == "give --checkpoint, or a --gguf of full precision"
    assert found.left_out["loop"] == "give --checkpoint"
    found = line_up(replace(PEERED, gguf=GgufFiles(FULL, (), (FULL,)), modules=MODULES - {"gguf"}))
    assert found.left_out["llama.cpp"].startswith("no gguf in")
    assert "do not fit" in line_up(replace(PEERED, room=6999)).left_out["llama.cpp-ram"]


def test_a_cap_that_no_quantisation_fits_is_said() -> None:
    found = line_up(replace(PEERED, caps=(1_000, 2_500)))
    assert "No quantised file given fits 1e-06 GB." in found.notes


def test_only_those_asked_for() -> None:
    found = line_up(replace(PEERED, only=("native", "loop")))
    assert (list(models(found)), found.left_out, found.notes) == (["native", "loop"], {}, [])
    with pytest.raises(PeerError, match=r"no contender 'natiev'; there are naive, hybrid"):
        line_up(replace(PEERED, only=("natiev",)))
    with pytest.raises(PeerError, match=r"nobody can run \(airllm: give --checkpoint\)"):
        line_up(replace(SPARSE, only=("airllm",)))


def test_the_ladders_predictor_where_nobody_says() -> None:
    assert default_predictor(CALIBRATED) == "low-rank"
    assert default_predictor(replace(CALIBRATED, kinds=frozenset({"certified"}))) == "certified"
    assert default_predictor(DENSE) == default_predictor(PLAIN) == "exact"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("lineup") / "demo.flash"
    pack(Path(flashinfer.__file__).parent / "_demo", path)
    return open_store(path).manifest


def test_what_a_store_carries(manifest: Manifest) -> None:
    assert carries(PACKED, manifest) == PLAIN
    some = next(iter(manifest.tensors.values()))
    roles = dict.fromkeys(["layers.0.ffn.lowrank.a.weight", "layers.0.ffn.sketch.weight"], some)
    layers = tuple(replace_struct(layer, decision="bundled") for layer in manifest.layers)
    richer = replace_struct(manifest, tensors=manifest.tensors | roles, layers=layers)
    assert carries(STORE, richer) == CALIBRATED
    silu = replace_struct(manifest, facts=replace_struct(manifest.facts, activation="silu"))
    silu = replace_struct(silu, tensors=manifest.tensors | {"layers.0.ffn.threshold": some})
    assert carries(STORE, silu) == DENSE


def test_half_of_the_weights_at_most(manifest: Manifest) -> None:
    weights = manifest.weight_bytes()
    for cap, half in ((Cap(weight_memory=4 * weights), True), (Cap(weight_memory=weights // 2 - 1), False)):
        plan = resolve(manifest, Request(16, 1, 512, 0, RunConfig(), cap))
        assert halved(cap, weights, plan) == (Cap(weight_memory=weights // 2) if half else cap)


def test_rungs_as_the_runtime_is_told_of_them() -> None:
    told = {rung.name: run_of(rung, "low-rank", "f16") for rung in (*LADDER, *OTHERS)}
    assert {name for name, run in told.items() if run.io.objective == "bytes"} == {"predictor", "window"}
    assert {name for name, run in told.items() if run.lookahead} == {
        "low-rank+lookahead",
        "router+lookahead",
    }
    torch = {name for name, run in told.items() if run.backend == "torch" and run.io.reader == "threads"}
    assert torch == {"naive", "hybrid", "predictor", "window", "bundled"}
    assert {run.kv_type for run in told.values()} == {"f16"}


@pytest.mark.parametrize(
    ("name", "quant"),
    [("m.gguf", None), ("m-f16.gguf", None), ("m-q4_0.gguf", "q4_0"), ("m.Q5_K_M.gguf", "q5_k_m"),
     ("m-IQ2_XS.gguf", "iq2_xs"), ("qwen3.gguf", None), ("q8_0.gguf", None)],
)  # fmt: skip
def test_a_file_says_its_quantisation(name: str, quant: str | None) -> None:
    assert quant_of(Path(name)) == quant


def test_what_has_to_be_made(tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.touch()
    assert plan_files([], None, [], tmp_path) == GgufFiles(None, (), ())
    made = (tmp_path / "hf.gguf", tmp_path / "hf-q4_0.gguf")
    assert plan_files([], HF, ["q4_0"], tmp_path) == GgufFiles(made[0], (made[1],), made)
    quantised = tmp_path / "mine-q8_0.gguf"
    assert plan_files([mine], HF, ["q8_0"], tmp_path) == GgufFiles(mine, (quantised,), (quantised,))
    assert plan_files([quantised], None, [], tmp_path) == GgufFiles(quantised, (), (quantised,))
    assert plan_files([quantised, Q4], None, [], tmp_path).full is None
    with pytest.raises(PeerError, match="both seem to be of full precision"):
        plan_files([mine, Path("other.gguf")], None, [], tmp_path)
    with pytest.raises(PeerError, match="needs a model to quantise"):
        plan_files([Q4], None, ["q8_0"], tmp_path)


@given(st.dictionaries(st.sampled_from("abcdef").map(Path), st.integers(1, 50)), st.integers(1, 60))
def test_the_largest_below_the_cap(sizes: dict[Path, int], cap: int) -> None:
    best = best_that_fits(sizes, cap)
    below = [size for size in sizes.values() if size < cap]
    assert (best is None) == (not below)
    assert best is None or sizes[best] == max(below)
