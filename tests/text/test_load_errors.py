"""Every damaged tokenizer file is one clear StoreError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashinfer.errors import StoreError
from flashinfer.text import load_generation_defaults, load_tokenizer
from tests.shared_data import shared_data
from tests.tiny_tokenizers import tiny_gpt2, tiny_json, tiny_sentencepiece, tiny_tiktoken


def refusal(files: dict[str, Path]) -> str:
    with pytest.raises(StoreError) as caught:
        load_tokenizer(files)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_tokenizer(tmp_path: Path) -> None:
    assert "no tokenizer" in refusal({})
    assert "found vocab.json;" in refusal({"vocab.json": tmp_path / "vocab.json"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 5000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_not_a_tokenizer_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refusal({name: path})


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_files_cut_short(tmp_path: Path, keep: float) -> None:
    for make in (tiny_sentencepiece, tiny_json):
        files = make(tmp_path)
        name = next(iter(files))
        data = files[name].read_bytes()
        files[name].write_bytes(data[: int(len(data) * keep)])
        assert name in refusal(files)


def test_a_missing_file(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        assert "No such file" in refusal({name: tmp_path / name})


def test_vocabulary_and_merges_that_do_not_fit(tmp_path: Path) -> None:
    files = tiny_gpt2(tmp_path)
    files["merges.txt"].write_text("#version: 0.2\nnot there\n")
    assert "vocab.json" in refusal(files)


def test_a_splitting_that_is_not_in_the_files(tmp_path: Path) -> None:
    assert "BloomTokenizer" in refusal(tiny_gpt2(tmp_path, tokenizer_class="BloomTokenizerFast"))


def test_added_tokens_at_other_ids(tmp_path: Path) -> None:
    files = tiny_gpt2(tmp_path, added_tokens_decoder={"9999": {"content": "<extra>", "special": True}})
    assert "should have id 9999" in refusal(files)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece"},
        {"type": "Strip", "content": " ", "start": 2, "stop": 0},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}]},
        {"type": "Sequence", "decoders": ["Fuse"]},
    ],
)
def test_a_decoder_that_is_not_known(tmp_path: Path, decoder: dict[str, Any]) -> None:
    files = tiny_json(tmp_path)
    document = json.loads(files["tokenizer.json"].read_text())
    files["tokenizer.json"].write_text(json.dumps(document | {"decoder": decoder}))
    assert "decoder" in refusal(files)


@pytest.mark.parametrize("content", ['{"add_bos_token": 1}', '{"bos_token": 3}', "", '{"bos_token": {"id": 1}}'])
def test_a_damaged_config(tmp_path: Path, content: str) -> None:
    files = tiny_json(tmp_path)
    files["tokenizer_config.json"].write_text(content)
    assert "tokenizer_config.json" in refusal(files)


@pytest.mark.shared
def test_a_real_damaged_tokenizer() -> None:
    """This copy has lost its no-break spaces, so three of its merges are not pairs."""
    assert "Merges" in refusal({"tokenizer.json": shared_data("tokenizers/llama2/tokenizer.json")})


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["IQ== 0", "IQ 1"], "padding"),
        (["IQ== 0", "Ig== one"], "invalid literal"),
        (["IQ== 0", "Ig== 0"], "each of as many ranks"),
        (["IQ== 0", "Ig== 7"], "each of as many ranks"),
        (["IQ== 0", "Ig=="], "unpack"),
        (["IQ== 0", "Ig== 1"], "byte 0 has no token"),
    ],
)
def test_a_damaged_tiktoken_vocabulary(tmp_path: Path, lines: list[str], part: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines))
    message = refusal({path.name: path})
    assert "not a readable tiktoken vocabulary" in message
    assert part in message


def test_special_tokens_that_do_not_follow_a_tiktoken_vocabulary(tmp_path: Path) -> None:
    files, config = tiny_tiktoken(tmp_path, tokens=300), tmp_path / "tokenizer_config.json"
    config.write_text('{"added_tokens_decoder": {"302": {"content": "<|begin_of_text|>", "special": true}}}')
    assert "do not follow" in refusal(files | {config.name: config})


@pytest.mark.parametrize(
    "content",
    ['{"temperature": "hot"}', '{"top_k": 1.5}', '{"eos_token_id": [1, "2"]}', '{"do_sample": 1}', "[]", "nonsense"],
)
def test_damaged_generation_defaults(tmp_path: Path, content: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(StoreError, match=r"generation_config\.json"):
        load_generation_defaults({path.name: path})
