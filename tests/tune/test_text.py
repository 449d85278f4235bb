"""Texts are read in pieces, no more of them than is wanted; what cannot be used is said in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.errors import TextError
from flashinfer.text import Tokenizer, load_tokenizer
from flashinfer.tune import text
from flashinfer.tune.text import TextTokens, read_tokens, split
from tests.tiny_tokenizers import CORPUS, tiny_json, tiny_sentencepiece

MANY = 10**9
STORY = "".join(line if line.endswith("\n") else line + "\n" for line in CORPUS) * 5


class Bytes(Tokenizer):
    """Each byte is a token, and every text said so is written down."""

    vocab_size, bos_id, eos_ids, strips_leading_space = 256, None, (), False

    def __init__(self) -> None:
        self.said: list[str] = []

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        assert not add_bos
        self.said.append(text)
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text, "PIECE", 64)
    return 64


def written(folder: Path, data: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("tiny", [tiny_json, tiny_sentencepiece])
def test_a_text_of_one_piece_is_tokenised_whole(tmp_path: Path, tiny) -> None:
    tokenizer = load_tokenizer(tiny(tmp_path))
    found = read_tokens(written(tmp_path, STORY), tokenizer, MANY)
    assert found.ids.dtype == np.int64
    assert found.ids.tolist() == tokenizer.encode(STORY, add_bos=False)
    assert found == TextTokens(found.ids, xxhash.xxh3_128_hexdigest(STORY.encode()), len(STORY.encode()))
    assert found.about() == {"tokens": len(found.ids), "bytes": found.bytes, "xxh3": found.xxh3}


def test_no_more_is_read_than_is_wanted(tmp_path: Path, small_pieces: int) -> None:
    tokenizer, data = Bytes(), STORY.encode()
    found = read_tokens(written(tmp_path, STORY), tokenizer, 100)
    assert bytes(found.ids.tolist()) == data[:100]
    assert 100 <= found.bytes < 100 + small_pieces
    assert found.xxh3 == xxhash.xxh3_128_hexdigest(data[: found.bytes])
    assert "".join(tokenizer.said).encode() == data[: found.bytes]


def test_lines_stay_whole(tmp_path: Path, small_pieces: int) -> None:
    lines, tokenizer = [f"this is line {n}\n" for n in range(50)], Bytes()
    read_tokens(written(tmp_path, "".join(lines)), tokenizer, MANY)
    assert len(tokenizer.said) > 10
    assert all(piece.endswith("\n") for piece in tokenizer.said)


def test_words_stay_whole_where_there_are_no_lines(tmp_path: Path, small_pieces: int) -> None:
    words, tokenizer = [f"word{n}" for n in range(50)], Bytes()
    read_tokens(written(tmp_path, " ".join(words)), tokenizer, MANY)
    assert len(tokenizer.said) > 5
    assert [word for piece in tokenizer.said for word in piece.split()] == words
    assert all(piece.startswith(" ") for piece in tokenizer.said[1:])


@given(st.text(max_size=400), st.integers(8, 70))
def test_every_text_comes_through_whole(tmp_path_factory, said: str, size: int) -> None:
    path = written(tmp_path_factory.getbasetemp(), said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", size)
        if not said:
            with pytest.raises(TextError, match="is empty"):
                read_tokens(path, Bytes(), MANY)
            return
        tokenizer = Bytes()
        found = read_tokens(path, tokenizer, MANY)
    assert bytes(found.ids.tolist()) == said.encode()
    assert all(0 < len(piece.encode()) <= size for piece in tokenizer.said)


@pytest.mark.parametrize("before", [0, 3, 63, 64, 200])
def test_a_byte_that_is_no_utf8_is_named(tmp_path: Path, small_pieces: int, before: int) -> None:
    data = ("ab cd\n" * 40).encode()
    path = written(tmp_path, data[:before] + b"\xff" + data[before:])
    with pytest.raises(TextError, match=rf"not UTF-8: byte {before} "):
        read_tokens(path, Bytes(), MANY)


def test_a_character_that_the_end_cuts_is_named(tmp_path: Path, small_pieces: int) -> None:
    path = written(tmp_path, b"x" * 100 + "\u4f60".encode()[:2])
    with pytest.raises(TextError, match="not UTF-8: byte 100 "):
        read_tokens(path, Bytes(), MANY)


def test_what_is_not_wanted_may_be_anything(tmp_path: Path, small_pieces: int) -> None:
    assert len(read_tokens(written(tmp_path, b"word " * 30 + b"\xff"), Bytes(), 20).ids) == 20


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no\.txt: No such file"):
        read_tokens(tmp_path / "no.txt", Bytes(), 1)
    with pytest.raises(TextError, match="Is a directory"):
        read_tokens(tmp_path, Bytes(), 1)


def test_too_short_for_a_window(tmp_path: Path) -> None:
    path = written(tmp_path, "seven b")
    assert len(read_tokens(path, Bytes(), 100, least=7).ids) == 7
    with pytest.raises(TextError, match="has 7 tokens, a window takes 8"):
        read_tokens(path, Bytes(), 100, least=8)


def test_the_end_is_held_out() -> None:
    fit, held = split(np.arange(10), 3)
    assert (fit.tolist(), held.tolist()) == (list(range(7)), [7, 8, 9])
    assert [len(part) for part in split(np.arange(10), 0)] == [10, 0]
    for count in (10, 11, -1):
        with pytest.raises(TextError, match="of 10 tokens"):
            split(np.arange(10), count)
