"""Token ids and decodings against independent implementations: llama.cpp's cases and the libraries themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tokenizers

from flashinfer.text import Tokenizer, load_tokenizer
from tests.shared_data import shared_data
from tests.tiny_tokenizers import CORPUS, tiny_gpt2, tiny_json

pytestmark = pytest.mark.shared
PREFERRED = {
    "llama-spm": "llama2/tokenizer.model",
    "falcon": "falcon/tokenizer.json",
    "mpt": "gpt_neox_20b/tokenizer.json",
    "llama-bpe": "llama3/tokenizer.model",
    "phi-3": "llama2/tokenizer.model",
}


def cases(name: str) -> Iterator[tuple[str, list[int]]]:
    """Text and ids of llama.cpp's cases for a vocabulary."""
    folder = shared_data("tokenizers/expected")
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = (folder / f"{name}.out").read_text().split("\n")
    return zip(texts, ([int(i) for i in line.split()] for line in ids), strict=True)


@cache
def load(name: str) -> Tokenizer:
    path = shared_data(f"tokenizers/{name}")
    return load_tokenizer({path.name: path})


@pytest.mark.parametrize("name", PREFERRED)
def test_ids_are_the_expected_ones(name: str) -> None:
    tokenizer = load(PREFERRED[name])
    for text, ids in cases(name):
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids) == text


def test_llama_3_has_its_special_tokens() -> None:
    tokenizer = load("llama3/tokenizer.model")
    assert (tokenizer.base_size, tokenizer.vocab_size) == (128000, 128256)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (128000, (128001, 128009))
    tokens = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
    assert tokens == [128000, 128006, 882, 128007, 271, 13347, 128009]


def test_llama_as_tokenizer_json(tmp_path: Path) -> None:
    """The stored file has lost its no-break spaces; the vocabulary of tokenizer.model has them."""
    document = json.loads(shared_data("tokenizers/llama2/tokenizer.json").read_text())
    vocab = {piece.replace(" ", "\xa0"): i for piece, i in document["model"]["vocab"].items()}
    merges = [m.split(" ") if m.count(" ") == 1 else mend(m, vocab) for m in document["model"]["merges"]]
    document["model"] |= {"vocab": vocab, "merges": merges}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    tokenizer = load_tokenizer({path.name: path})
    model = load("llama2/tokenizer.model")
    assert tokenizer.bos_id == model.bos_id == 1
    for text, ids in cases("llama-spm"):
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.encode(text) == model.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == model.decode(ids) == text


def mend(merge: str, vocab: dict[str, int]) -> list[str]:
    mended = merge.replace(" ", "\xa0")
    splits = ([mended[:i], mended[i + 1 :]] for i, c in enumerate(merge) if c == " ")
    return next(s for s in splits if all(half in vocab for half in s) and len(s[0]) == len(s[1]))


def test_gpt2_from_vocab_and_merges(tmp_path: Path) -> None:
    """phi-2's vocabulary is GPT-2's, with tokens added at the end."""
    model = json.loads(shared_data("tokenizers/phi2/tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]))
    tokenizer = load_tokenizer({n: tmp_path / n for n in ("vocab.json", "merges.txt")})
    for text, ids in cases("gpt-2"):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_qwen2_from_vocab_and_merges(tmp_path: Path) -> None:
    folder = shared_data("tokenizers/qwen2")
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    files = {n: folder / n for n in ("vocab.json", "merges.txt")}
    tokenizer = load_tokenizer(files | {config.name: config})
    for text, ids in cases("qwen2"):
        assert tokenizer.encode(text) == ids


def test_opt_puts_its_eos_in_front(tmp_path: Path) -> None:
    folder = shared_data("tokenizers/opt_gpt2")
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "bos_token": "</s>"}')
    files = {"vocab.json": folder / "gpt2-vocab.json", "merges.txt": folder / "gpt2-merges.txt"}
    tokenizer = load_tokenizer(files | {config.name: config})
    assert tokenizer.encode("Hello world") == [2, 31414, 232]


@pytest.mark.parametrize("name", ["falcon", "phi2", "gpt_neox_20b"])
def test_decoding_is_the_librarys(name: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(shared_data(f"tokenizers/{name}/tokenizer.json")))
    tokenizer = load(f"{name}/tokenizer.json")
    for text, _ in cases("gpt-2"):
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_tiny_tokenizers_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    for folder in ("json", "gpt2"):
        (tmp_path / folder).mkdir()
    json_files, gpt2_files = tiny_json(tmp_path / "json"), tiny_gpt2(tmp_path / "gpt2")
    pairs = [
        (json_files, PreTrainedTokenizerFast(tokenizer_file=str(json_files["tokenizer.json"]))),
        (gpt2_files, GPT2Tokenizer.from_pretrained(str(tmp_path / "gpt2"))),
    ]
    for files, theirs in pairs:
        ours = load_tokenizer(files)
        for text in [*CORPUS, "", " x", "a</s>b", "</s> <s>"]:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
