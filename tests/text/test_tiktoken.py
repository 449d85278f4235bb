"""Llama 3's vocabulary: tiktoken's own way of merging as the oracle, and where special tokens lie."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.text import Tokenizer, load_tokenizer
from flashinfer.text.tiktoken import llama3_specials, vocabulary_and_merges
from tests.tiny_tokenizers import tiny_tiktoken


def ranks_of(path: Path) -> dict[bytes, int]:
    rows = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def plain_merge(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's rule: the neighbours that make the token of lowest rank are merged, the leftmost first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while piece not in ranks:
        made = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not made:
            return [ranks[part] for part in parts]
        at = min(made)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[piece]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tiktoken(tmp_path_factory.mktemp("tiktoken"))["tokenizer.model"]


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return load_tokenizer({file.name: file})


@settings(max_examples=100, deadline=None)
@given(word=st.text("abcdeghilnoprst", min_size=1, max_size=12))
def test_a_word_is_merged_by_rank(file: Path, tokenizer: Tokenizer, word: str) -> None:
    assert tokenizer.encode(word, add_bos=False) == plain_merge(ranks_of(file), word.encode())


def test_every_cut_of_a_token_is_a_merge_in_order_of_rank() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    vocabulary, merges = vocabulary_and_merges(ranks)
    assert vocabulary == {token.decode(): rank for token, rank in ranks.items()}
    assert merges == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_specials_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tiktoken(tmp_path, tokens=300))
    assert (tokenizer.base_size, tokenizer.vocab_size) == (300, 556)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (300, (301, 309))
    assert tokenizer.encode("") == [300]
    assert tokenizer.encode("<|start_header_id|><|eot_id|>", add_bos=False) == [306, 309]
    assert tokenizer.decode([300, 306, 309, 555]) == ""
    assert len(set(llama3_specials())) == 256


def test_the_configuration_names_specials_and_bos(tmp_path: Path) -> None:
    files, config = tiny_tiktoken(tmp_path, tokens=300), tmp_path / "tokenizer_config.json"
    added = {str(300 + i): {"content": f"<|{i}|>", "special": True} for i in range(3)}
    content = {"added_tokens_decoder": added, "bos_token": "<|1|>", "eos_token": "<|2|>", "add_bos_token": False}
    config.write_text(json.dumps(content))
    tokenizer = load_tokenizer(files | {config.name: config})
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (303, 301, (302,))
    assert tokenizer.encode("<|0|>") == [300]
