"""Tokenizers rebuilt from GGUF metadata, against llama.cpp's expected ids."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.checkpoint.gguf.bpe import SPLITTINGS
from flashinfer.checkpoint.gguf.tensors import GgufFile
from flashinfer.checkpoint.gguf.tokenizer import tokenizer_files
from flashinfer.generate import chat_template_of
from flashinfer.text import Detokenizer, Tokenizer, load_tokenizer
from tests.compile.gguf_files import write_gguf
from tests.shared_data import shared_data
from tests.text.test_expected_ids import cases
from tests.tiny_tokenizers import tiny_gpt2, tiny_sentencepiece

SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "c", "<|x|>"],
    "tokenizer.ggml.scores": np.array([0, 0, 0, -3, -4, -5, -1, -2, 0, 0], np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1, 1, 4], np.int32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "Ġ", "Ġa", "ab", "<|end|>", "<tool>"],
    "tokenizer.ggml.merges": ["Ġ a", "a b"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 1, 3, 4], np.int32),
    "tokenizer.ggml.bos_token_id": 5,
    "tokenizer.ggml.eos_token_id": 5,
}


def load(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    files = tokenizer_files(metadata)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return load_tokenizer({name: folder / name for name in files})


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2", "falcon", "mpt"])
def test_ids_are_the_expected_ones(tmp_path: Path, name: str) -> None:
    tokenizer = load(tmp_path, GgufFile(shared_data(f"gguf/ggml-vocab-{name}.gguf")).header.metadata)
    for text, ids in cases(name):
        assert tokenizer.encode(text, add_bos=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.shared
def test_a_file_that_does_not_say_how_text_is_split(tmp_path: Path) -> None:
    """GPT-NeoX's vocabulary is MPT's."""
    tokenizer = load(tmp_path, GgufFile(shared_data("gguf/ggml-vocab-gpt-neox.gguf")).header.metadata)
    for text, ids in cases("mpt"):
        assert tokenizer.encode(text) == ids


@pytest.mark.shared
def test_qwen2(tmp_path: Path) -> None:
    folder = shared_data("tokenizers/qwen2")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().split("\n")
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.merges": [m for m in merges if m and not m.startswith("#version")],
    }  # fmt: skip
    tokenizer = load(tmp_path, metadata)
    for text, ids in cases("qwen2"):
        assert tokenizer.encode(text) == ids


@pytest.mark.shared
def test_llama3(tmp_path: Path) -> None:
    """From tiktoken's file: the merges of those tokens that can occur in the texts."""
    lines = shared_data("tokenizers/llama3/tokenizer.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    texts = "".join(text for text, _ in cases("llama-bpe")).encode()
    byte_of = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    byte_of |= {chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in byte_of.values())}
    letter = {b: c for c, b in byte_of.items()}

    def piece(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    occurring = (t for t in sorted(ranks, key=ranks.__getitem__) if len(t) > 1 and t in texts)
    halves = (last_merge(ranks, token) for token in occurring)
    merges = [" ".join(map(piece, parts)) for parts in halves if len(parts) == 2]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": [*map(piece, sorted(ranks, key=ranks.__getitem__)), "<|begin_of_text|>"],
        "tokenizer.ggml.token_type": np.array([1] * len(ranks) + [3], np.int32),
        "tokenizer.ggml.bos_token_id": len(ranks),
    }  # fmt: skip
    tokenizer = load(tmp_path, metadata)
    for text, ids in cases("llama-bpe"):
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.encode(text) == [128000, *ids]


def last_merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The parts byte-pair encoding makes of a token but for its last merge; more than two where none leads to it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        if min(joined) == len(ranks):
            break
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class TestSentencePiece:
    def test_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path, SPM)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
        assert tokenizer.encode("abc") == [1, 6, 5, 8]
        assert tokenizer.encode("a</s>a", add_bos=False) == [6, 2, 6]
        assert tokenizer.encode("a<|x|>", add_bos=False) == [6, 9]

    def test_flags(self, tmp_path: Path) -> None:
        flags = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
        assert load(tmp_path, SPM | flags).encode("ab") == [7]

    def test_a_token_id_of_none(self) -> None:
        files = tokenizer_files(SPM | {"tokenizer.ggml.eos_token_id": 0xFFFFFFFF})
        assert "eos_token" not in json.loads(files["tokenizer_config.json"])


class TestBpe:
    def test_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path, BPE)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (5, (5,))
        assert tokenizer.encode("ab a<|end|><tool>b") == [4, 3, 5, 6, 1]
        assert tokenizer.decode([4, 5, 6]) == "ab<tool>"

    def test_bos(self, tmp_path: Path) -> None:
        assert load(tmp_path, BPE | {"tokenizer.ggml.add_bos_token": True}).encode("ab") == [5, 4]
        assert load(tmp_path, BPE | {"tokenizer.ggml.pre": "llama-bpe"}).encode("ab") == [5, 4]

    @pytest.mark.parametrize("pre", SPLITTINGS)
    def test_every_way_of_splitting_is_understood(self, tmp_path: Path, pre: str) -> None:
        tokenizer = load(tmp_path, BPE | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
        assert tokenizer.encode("ab a") == [4, 3]


SPLIT = "It's 12345 IT'S \u00dcberX!?\n\n  x\u4f60\u597d\u2026y"
WORDS = " x\u4f60\u597d"
MARKS = ["\u2026", "y"]
GPT2 = ["It", "'s", " 12345", " IT", "'", "S", " \u00dcberX", "!?", "\n\n ", WORDS, *MARKS]
CL100K = ["It", "'s", " ", "123", "45", " IT", "'S", " \u00dcberX", "!?\n\n", " ", WORDS, "\u2026y"]
QWEN2 = ["It", "'s", " ", *"12345", " IT", "'S", " \u00dcberX", "!?\n\n", " ", WORDS, "\u2026y"]
APART = ["It", "'s", " ", *"12345", " IT", "'", "S", " \u00dcberX", "!?", "\n\n ", WORDS, *MARKS]
PIECES = {
    "gpt-2": GPT2, "phi-2": GPT2, "mpt": GPT2, "olmo": GPT2,
    "falcon": ["It", "'", "s", " ", "123", "45", *GPT2[3:]],
    "llama-bpe": CL100K, "llama3": CL100K, "llama-v3": CL100K, "falcon3": CL100K, "smaug-bpe": CL100K, "dbrx": CL100K,
    "qwen2": QWEN2, "stablelm2": QWEN2, "deepseek-r1-qwen": QWEN2,
    "starcoder": APART, "refact": APART, "command-r": APART, "smollm": APART,
    "gpt-4o": ["It's", " ", "123", "45", " IT'S", " \u00dcber", "X", "!?\n\n", " ", WORDS, "\u2026y"],
    "tekken": ["It", "'s", " ", *"12345", " IT", "'S", " \u00dcber", "X", "!?\n\n", " ", WORDS, "\u2026y"],
    "bloom": ["It's", " 12345", " IT'S", " \u00dcberX", "!?\n\n ", WORDS, *MARKS],
    "deepseek-coder": [
        "It", "'", "s", " ", *"12345", " IT", "'", "S", " \u00dcberX", "!?", "\n", "\n", " ", " x", "\u4f60\u597d",
        *MARKS,
    ],
}  # fmt: skip
"""Where each splits `SPLIT`. Written down from a comparison of token ids with llama.cpp's."""


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_where_a_text_is_split(pre: str) -> None:
    pieces = [SPLIT]
    for pattern in SPLITTINGS[pre].patterns:
        split = Split(Regex(pattern), behavior="isolated")
        pieces = [p for piece in pieces for p, _ in split.pre_tokenize_str(piece)]
    assert pieces == PIECES[pre]


def spm_metadata(files: dict[str, Path]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a sentencepiece model."""
    model = sentencepiece.SentencePieceProcessor(str(files["tokenizer.model"]))
    ids = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32), "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(), "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }  # fmt: skip


def bpe_metadata(files: dict[str, Path]) -> dict[str, Any]:
    """The same of a byte-level BPE."""
    vocab = json.loads(files["vocab.json"].read_text())
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [3 if token in ("<s>", "<pad>", "</s>", "<unk>") else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": files["merges.txt"].read_text().split("\n")[1:-1],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32), "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": vocab["</s>"], "tokenizer.ggml.eos_token_id": vocab["</s>"],
    }  # fmt: skip


KINDS = {"llama": (tiny_sentencepiece, spm_metadata), "gpt2": (tiny_gpt2, bpe_metadata)}


@pytest.fixture(scope="module", params=KINDS)
def rebuilt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer, and what is rebuilt of it from a GGUF file's metadata."""
    make, metadata = KINDS[request.param]
    files = make(tmp_path_factory.mktemp("source"))
    return load_tokenizer(files), load(tmp_path_factory.mktemp("rebuilt"), metadata(files))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_rebuilt_tokenizer_is_its_source(rebuilt: tuple[Tokenizer, Tokenizer], text: str) -> None:
    source, ours = rebuilt
    assert ours.encode(text) == source.encode(text)
    stream = Detokenizer(ours)
    pieces = [stream.push(token) for token in ours.encode(text)]
    assert "".join(pieces) + stream.flush() == source.decode(source.encode(text))
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


class TestRefused:
    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (BPE | {"tokenizer.ggml.pre": "new"}, r"pre = 'new', known are gpt-2, .*get the model as safetensors"),
            ({k: v for k, v in BPE.items() if k != "tokenizer.ggml.pre"}, r"pre = 'None'"),
            (BPE | {"tokenizer.ggml.tokens": ["a"] * 7}, "occurs twice"),
            (BPE | {"tokenizer.ggml.merges": ["x y"]}, "makes no BPE"),
            (BPE | {"tokenizer.ggml.merges": ["xy"]}, "makes no BPE"),
            (BPE | {"tokenizer.ggml.merges": 7}, "no list of tokens"),
            (BPE | {"tokenizer.ggml.tokens": []}, "no list of tokens"),
            (BPE | {"tokenizer.ggml.token_type": np.array([1], np.int32)}, "7 tokens and another number of token_type"),
            (BPE | {"tokenizer.ggml.token_type": np.full(7, 9, np.int32)}, "types or scores of tokens"),
            (SPM | {"tokenizer.ggml.scores": np.full(10, np.nan, np.float32)}, "types or scores of tokens"),
            (SPM | {"tokenizer.ggml.tokens": [*"abcdefghi", ""]}, "makes no sentencepiece model"),
            (SPM | {"tokenizer.ggml.tokens": ["a"] * 10}, "makes no sentencepiece model"),
        ],
    )  # fmt: skip
    def test_vocabularies(self, metadata: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tokenizer_files(metadata)

    def test_no_vocabulary(self) -> None:
        assert tokenizer_files({}) == tokenizer_files({"tokenizer.ggml.model": "none"}) == {}


def test_what_a_checkpoint_carries(tmp_path: Path) -> None:
    tokens = [f"<{i}>" for i in range(20)]
    types = np.array([2, 3, 3, *[1] * 17], np.int32)
    write_gguf(
        tmp_path / "x.gguf", tokenizer__ggml__model="llama", tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=np.zeros(20, np.float32).tolist(), tokenizer__ggml__token_type=types.tolist(),
        tokenizer__ggml__eos_token_id=2, tokenizer__chat_template="{{ messages }}",
    )  # fmt: skip
    c = open_checkpoint(tmp_path / "x.gguf")
    assert set(c.text) == {"config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}
    assert c.text["chat_template.jinja"].read_text() == "{{ messages }}"
    assert json.loads(c.text["config.json"].read_text())["eos_token_id"] == 2
    c.close()
    pack(tmp_path / "x.gguf", tmp_path / "store")
    template = chat_template_of(tmp_path / "store")
    assert template.source == "{{ messages }}"
