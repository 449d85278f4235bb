"""From the files of a checkpoint to a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashinfer.errors import StoreError
from flashinfer.text.config import read_tokenizer_config
from flashinfer.text.tokenizer import Tokenizer


def load_tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer of a checkpoint whose text files are `files`, by the names the checkpoint used.

    `tokenizer.json` is preferred, then `tokenizer.model` (sentencepiece), then `vocab.json` with
    `merges.txt`. Which library that takes is imported only now.

    Raises:
        StoreError: there is none of them, or the one preferred is damaged.
    """
    config = read_tokenizer_config(files)
    if path := files.get("tokenizer.json"):
        from flashinfer.text.hf import tokenizer_from_json

        return tokenizer_from_json(path, config)
    if path := files.get("tokenizer.model"):
        from flashinfer.text.spm import tokenizer_from_sentencepiece

        return tokenizer_from_sentencepiece(path, config)
    if (vocab := files.get("vocab.json")) and (merges := files.get("merges.txt")):
        from flashinfer.text.hf import tokenizer_from_vocab

        return tokenizer_from_vocab(vocab, merges, config)
    found = ", ".join(sorted(files)) or "nothing"
    raise StoreError(
        "the store has no tokenizer: tokenizer.json, tokenizer.model or vocab.json with merges.txt "
        f"was expected, found {found}; add one to the checkpoint and pack again"
    )
