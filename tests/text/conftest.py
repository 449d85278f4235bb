from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.text import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import tiny_gpt2, tiny_json, tiny_llama_json, tiny_sentencepiece, tiny_tiktoken

TINY: dict[str, Callable[[Path], dict[str, Path]]] = {
    "sentencepiece": tiny_sentencepiece,
    "json": tiny_json,
    "llama-json": tiny_llama_json,
    "gpt2": tiny_gpt2,
    "tiktoken": tiny_tiktoken,
}


@pytest.fixture(scope="session", params=list(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One tokenizer of each kind, trained once."""
    return load_tokenizer(TINY[request.param](tmp_path_factory.mktemp(request.param)))
