"""A tokenizer that belongs to another model is refused when the store is opened."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

import flashinfer
from flashinfer.errors import PromptError, StoreError
from flashinfer.generate import load

ROWS = 2048
"""Of the embedded model's embedding."""


def packed(folder: Path, tokens: int, **config: object) -> Path:
    """The embedded model with a tokenizer of so many tokens: all bytes, and pairs of them."""
    pieces = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    checkpoint = folder / "checkpoint"
    shutil.copytree(Path(flashinfer.__file__).parent / "_demo", checkpoint)
    lines = (f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(pieces[:tokens]))
    (checkpoint / "tokenizer.model").write_text("".join(lines))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    flashinfer.pack(checkpoint, folder / "store")
    return folder / "store"


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"its tokenizer has {ROWS + 1} tokens, its embedding {ROWS}") as caught:
        load(packed(tmp_path, ROWS + 1))
    assert "\n" not in str(caught.value)


def test_added_tokens_without_a_row_are_refused_when_they_occur(tmp_path: Path) -> None:
    added = {str(ROWS): {"content": "<pad>", "special": True}}
    with load(packed(tmp_path, ROWS, added_tokens_decoder=added), context=32) as model:
        assert len(model.generate("Hi", max_new_tokens=2).tokens) == 2
        with pytest.raises(PromptError, match=f"token id {ROWS} lies outside the model's vocabulary of {ROWS} tokens"):
            model.generate("Hi<pad>")
