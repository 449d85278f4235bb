"""Synthetic mixtures: what was planted is what the router chooses, and other programs compute the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.planted.experts.cli import main
from benchmarks.planted.experts.locality import Mix, busiest, repeated, within
from benchmarks.planted.experts.measure import Routed, measure_mixture
from benchmarks.planted.experts.shape import SHAPES, MixtureShape, shape_named
from benchmarks.planted.experts.source import PlantedMixture
from benchmarks.planted.experts.to_gguf import write_gguf
from benchmarks.planted.text import pseudo_text
from flashinfer import pack
from flashinfer.bench.cache import Setting
from flashinfer.engine import Model
from flashinfer.store import open_store
from flashinfer.text import load_tokenizer

TINY = SHAPES["tiny"]
SMALLEST = MixtureShape(64, 2, 4, 2, 32, 4, 2, 32, vocab=512, context=64)
PROMPT, TOKENS = 48, 160


@dataclass(frozen=True)
class Made:
    store: Path
    ids: list[int]
    layers: list[Routed]


def ids_of(store: Path, count: int) -> list[int]:
    opened = open_store(store)
    tokenizer = load_tokenizer({name: opened.path_of(entry) for name, entry in opened.manifest.text.items()})
    return list(tokenizer.encode(f" {pseudo_text(count)}"))[:count]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    store = tmp_path_factory.mktemp("mixture") / "store"
    pack(PlantedMixture(TINY), store, quant="q4_0")
    ids = ids_of(store, PROMPT + TOKENS)
    return Made(store, ids, measure_mixture(store, ids, TOKENS))


@pytest.fixture(scope="module")
def source() -> Iterator[PlantedMixture]:
    opened = PlantedMixture(SMALLEST)
    yield opened
    opened.close()


class Kept:
    """A checkpoint that its next user cannot close."""

    def __init__(self, source: PlantedMixture) -> None:
        self._source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def close(self) -> None:
        """Nothing."""


def test_the_router_shows_the_locality_that_was_planted(made: Made) -> None:
    chance = TINY.per_token / TINY.experts
    for layer in made.layers:
        assert (layer.chosen.sum(axis=1) == TINY.per_token).all()
        seen = layer.summary()
        assert 0.33 < seen["repeated"] < 0.5
        assert seen["within"] > 0.7 > 1 - (1 - chance) ** 8
        assert 0.45 < seen["busiest"] < 0.8


def test_without_memory_or_favourites_only_returning_words_repeat(tmp_path: Path) -> None:
    pack(PlantedMixture(TINY, Mix(token=0.92, short=0, long=0, popularity=0)), tmp_path / "store")
    layers = measure_mixture(tmp_path / "store", ids_of(tmp_path / "store", PROMPT + TOKENS), TOKENS)
    assert max(layer.summary()["repeated"] for layer in layers) < 0.22  # by chance 0.125


def test_slots_hit_more_than_chance_and_less_than_the_optimum(made: Made) -> None:
    for layer in made.layers:
        for share, rates in layer.summary()["hits"].items():
            assert float(share) < rates["LRU"] < rates["optimum"] < 1
            assert float(share) < rates["window 5 + LFU"] < rates["optimum"]


def test_most_tokens_of_the_text_are_words(made: Made) -> None:
    words = [i for i in made.ids if i >= 258]
    assert len(words) > 0.8 * len(made.ids)
    assert len(set(words)) > 60


def test_transformers_computes_the_same(source: PlantedMixture, tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    oracle = Qwen3MoeForCausalLM(Qwen3MoeConfig(**dict(source.config))).eval()
    oracle.load_state_dict(stacked({n: torch.from_numpy(source.values(n)) for n in source.tensors}, source))
    ids = [300 + n * n % 200 for n in range(24)]
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    pack(Kept(source), tmp_path / "store")
    with Model.open(tmp_path / "store") as model:
        logits = model.logits(model.session(), ids)
    assert np.abs(logits - expected).max() < 1e-4


def stacked(tensors: dict[str, object], source: PlantedMixture) -> dict[str, object]:
    """As this version of transformers names and stacks them."""
    import torch

    out = {}
    for name, info in source.tensors.items():
        if ".experts." not in name:
            out[name] = tensors[name].reshape(info.shape)
    for i in range(source.shape.layers):
        at = f"model.layers.{i}.mlp.experts"
        parts = {
            part: torch.stack([tensors[f"{at}.{e}.{part}_proj.weight"] for e in range(source.shape.experts)])
            for part in ("gate", "up", "down")
        }
        out[f"{at}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        out[f"{at}.down_proj"] = parts["down"]
    return out


def test_the_gguf_file_holds_the_same_tensors(source: PlantedMixture, tmp_path: Path) -> None:
    assert write_gguf(source, tmp_path / "m.gguf") == (tmp_path / "m.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: t for t in reader.tensors}
    assert len(found) == 3 + SMALLEST.layers * 12
    experts = found["blk.1.ffn_down_exps.weight"]
    assert experts.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert [int(n) for n in experts.shape] == [SMALLEST.size, SMALLEST.hidden, SMALLEST.experts]
    values = gguf.quants.dequantize(experts.data, experts.tensor_type)
    for e in range(SMALLEST.experts):
        exact = source.values(f"model.layers.1.mlp.experts.{e}.down_proj.weight")
        assert np.abs(values[e] - exact).max() <= np.abs(exact).max() / 7
    router = source.values("model.layers.0.mlp.gate.weight")
    assert np.array_equal(found["blk.0.ffn_gate_inp.weight"].data, router)
    key = reader.fields["qwen3moe.expert_used_count"]
    assert int(key.parts[key.data[0]][0]) == SMALLEST.per_token


def test_no_two_experts_are_the_same_bytes(source: PlantedMixture) -> None:
    names = [name for name in source.tensors if ".experts." in name]
    assert len({source.values(name).tobytes() for name in names}) == len(names)


@given(data=st.data())
def test_pieces_are_parts_of_the_whole(source: PlantedMixture, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(source.tensors)))
    rows, columns = source.tensors[name].matrix
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    whole = source.values(name)
    assert whole.shape == (rows, columns)
    assert np.allclose(source.read_rows(name, start, stop).view(np.float32), whole[start:stop], atol=1e-6)
    assert np.array_equal(source.read_columns(name, slice(1, 3)).view(np.float32), whole[:, 1:3])


def test_pack_closes_an_open_checkpoint(tmp_path: Path) -> None:
    source = PlantedMixture(SMALLEST)
    assert source.text["tokenizer.json"].exists()
    assert pack(source, tmp_path / "store").family == "qwen3_moe"
    assert not source.text["tokenizer.json"].exists()


@given(st.lists(st.sets(st.integers(0, 9), min_size=3, max_size=3), min_size=10, max_size=30))
def test_shares_against_plain_counting(tokens: list[set[int]]) -> None:
    chosen = np.zeros((len(tokens), 10), dtype=bool)
    for row, experts in zip(chosen, tokens, strict=True):
        row[list(experts)] = True
    again = [len(a & b) / 3 for a, b in pairwise(tokens)]
    assert repeated(chosen) == pytest.approx(np.mean(again))
    recent = [len(t & set().union(*tokens[n - 8 : n])) / 3 for n, t in enumerate(tokens) if n >= 8]
    assert within(chosen) == pytest.approx(np.mean(recent))
    assert 2 / 10 - 1e-9 <= busiest(chosen) <= 2 / 3 + 1e-9  # a quarter of ten are two


def test_all_slots_hit_all_but_first_uses() -> None:
    chosen = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    assert Routed(chosen, 3).hit_rate(1.0, Setting("LRU")) == pytest.approx(4 / 6)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, file, text = tmp_path / "s.flash", tmp_path / "m-q4_0.gguf", tmp_path / "text"
    main(["make", "tiny", "--layers", "1", "--store", str(store), "--gguf", str(file)])
    assert capsys.readouterr().out.count("MiB in") == 2
    main(["text", "120"])
    text.write_text(capsys.readouterr().out)
    main(["measure", str(store), "--text", str(text), "--tokens", "40", "--prompt", "20"])
    assert "slots for 25% of the experts, hits: window 5 + LFU" in capsys.readouterr().out
    main(["measure", str(store), "--tokens", "40", "--prompt", "20", "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 1
    for wrong in (["make", "tiny"], ["measure", str(store), "--text", str(text), "--tokens", "4000"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 1
    assert shape_named("tiny", 1).layers == 1
