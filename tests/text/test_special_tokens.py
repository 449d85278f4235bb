"""What surrounds a text, what is written out inside it, and what the configuration files change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashinfer.config import SamplingConfig
from flashinfer.text import GenerationDefaults, load_generation_defaults, load_tokenizer
from tests.tiny_tokenizers import tiny_gpt2, tiny_json, tiny_sentencepiece


def with_config(files: dict[str, Path], name: str, **content: object) -> dict[str, Path]:
    path = next(iter(files.values())).parent / name
    path.write_text(json.dumps(content))
    return files | {name: path}


def test_sentencepiece_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    files = tiny_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(files)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("The dog") == [1, *tokenizer.encode("The dog", add_bos=False)]
    plain = load_tokenizer(with_config(files, "tokenizer_config.json", add_bos_token=False))
    assert plain.encode("The dog") == tokenizer.encode("The dog", add_bos=False)


def test_sentencepiece_special_tokens_in_the_text(tmp_path: Path) -> None:
    files = tiny_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(files)
    the, dog = tokenizer.encode("The", add_bos=False), tokenizer.encode("a dog", add_bos=False)[1:]
    assert tokenizer.encode("The</s> dog", add_bos=False) == [*the, 2, *dog]
    legacy = load_tokenizer(with_config(files, "tokenizer_config.json", legacy=True))
    assert legacy.encode("The</s>The", add_bos=False) == [*the, 2, *the]
    assert tokenizer.encode("The</s>The", add_bos=False) != [*the, 2, *the]
    assert tokenizer.encode("") == [1]


def test_sentencepiece_added_tokens(tmp_path: Path) -> None:
    files = tiny_sentencepiece(tmp_path)
    size = load_tokenizer(files).vocab_size
    added = {
        str(size): {"content": "<|end|>", "special": True},
        str(size + 1): {"content": "<tab>", "special": False},
        "1": {"content": "<s>", "special": True},
    }
    tokenizer = load_tokenizer(
        with_config(files, "tokenizer_config.json", added_tokens_decoder=added, eos_token="<|end|>")
    )
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.eos_ids == (size,)
    assert tokenizer.encode("<tab><|end|>", add_bos=False) == [size + 1, size]
    assert tokenizer.decode([size + 1, size]) == "<tab>"


def test_json_follows_its_post_processor(tmp_path: Path) -> None:
    with_bos = load_tokenizer(tiny_json(tmp_path))
    assert with_bos.encode("dog") == [0, *with_bos.encode("dog", add_bos=False)]
    without = load_tokenizer(tiny_json(tmp_path, bos=False))
    assert without.encode("dog") == with_bos.encode("dog", add_bos=False)
    assert without.bos_id == 0  # named by tokenizer_config.json, yet not put in front


def test_json_without_any_config_still_knows_its_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer({"tokenizer.json": tiny_json(tmp_path)["tokenizer.json"]})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, ())


def test_special_tokens_map_fills_what_the_config_leaves_open(tmp_path: Path) -> None:
    files = with_config(tiny_json(tmp_path), "special_tokens_map.json", eos_token={"content": "<s>"}, bos_token="?")
    tokenizer = load_tokenizer(with_config(files, "tokenizer_config.json", bos_token="</s>"))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (0,))


def test_opt_puts_eos_in_front_when_its_config_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_gpt2(tmp_path))
    assert tokenizer.encode("dog")[0] == tokenizer.bos_id == 2
    bare = load_tokenizer(tiny_gpt2(tmp_path, add_bos_token=False))
    assert bare.encode("dog") == tokenizer.encode("dog", add_bos=False)


@pytest.mark.parametrize("eos", [2, [2, 5]])
def test_generation_defaults(tmp_path: Path, eos: int | list[int]) -> None:
    files = {n: tmp_path / n for n in ("generation_config.json", "config.json")}
    files["config.json"].write_text(json.dumps({"eos_token_id": 9, "architectures": ["X"]}))
    files["generation_config.json"].write_text('{"transformers_version": "5.0", "top_k": null}')
    assert load_generation_defaults(files).eos_ids == (9,)
    files["generation_config.json"].write_text(json.dumps({"eos_token_id": eos, "temperature": 1}))
    assert load_generation_defaults(files).eos_ids == (2, 5)[: len(eos) if isinstance(eos, list) else 1]
    assert load_generation_defaults({}).eos_ids == ()


def test_sampling_is_greedy_unless_asked_for() -> None:
    quiet = GenerationDefaults(temperature=0.7, top_p=0.9)
    assert quiet.sampling().temperature == 0
    assert quiet.sampling(repetition_penalty=1.1) == SamplingConfig(top_p=0.9, repetition_penalty=1.1)
    assert quiet.sampling(top_k=5) == SamplingConfig(temperature=0.7, top_k=5, top_p=0.9)
    asked = GenerationDefaults(do_sample=True, temperature=0.7, min_p=0.1)
    assert asked.sampling(seed=3) == SamplingConfig(temperature=0.7, min_p=0.1, seed=3)
    assert asked.sampling(temperature=0).temperature == 0
    assert GenerationDefaults(do_sample=True).sampling().temperature == 1
