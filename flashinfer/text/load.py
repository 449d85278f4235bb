"""From the files of a checkpoint to a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from flashinfer.errors import StoreError
from flashinfer.text.config import TokenizerConfig, read_tokenizer_config
from flashinfer.text.tokenizer import Tokenizer

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""A token in base64 and its rank; sentencepiece's files are protobuf."""


def has_tokenizer(files: Mapping[str, Path]) -> bool:
    """Whether `load_tokenizer` finds one, be it damaged."""
    return bool(files.keys() & {"tokenizer.json", "tokenizer.model"}) or files.keys() >= {"vocab.json", "merges.txt"}


def load_tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer of a checkpoint whose text files are `files`, by the names the checkpoint used.

    `tokenizer.json` is preferred, then `tokenizer.model` (sentencepiece, or Llama 3's of tiktoken), then
    `vocab.json` with `merges.txt`. Which library that takes is imported only now.

    Raises:
        StoreError: there is none of them, or the one preferred is damaged.
    """
    config = read_tokenizer_config(files)
    if path := files.get("tokenizer.json"):
        from flashinfer.text.hf import tokenizer_from_json

        return tokenizer_from_json(path, config)
    if path := files.get("tokenizer.model"):
        return _from_model(path, config)
    if (vocab := files.get("vocab.json")) and (merges := files.get("merges.txt")):
        from flashinfer.text.hf import tokenizer_from_vocab

        return tokenizer_from_vocab(vocab, merges, config)
    found = ", ".join(sorted(files)) or "nothing"
    raise StoreError(
        "the store has no tokenizer: tokenizer.json, tokenizer.model or vocab.json with merges.txt "
        f"was expected, found {found}; add one to the checkpoint and pack again"
    )


def _from_model(path: Path, config: TokenizerConfig) -> Tokenizer:
    """Two kinds of file go by the name `tokenizer.model`; the first line tells them apart."""
    try:
        with path.open("rb") as file:
            start = file.read(1000)
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror or e}; pack the checkpoint again") from e
    if _TIKTOKEN_LINE.match(start):
        from flashinfer.text.tiktoken import tokenizer_from_tiktoken

        return tokenizer_from_tiktoken(path, config)
    from flashinfer.text.spm import tokenizer_from_sentencepiece

    return tokenizer_from_sentencepiece(path, config)
