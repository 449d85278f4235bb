"""Tokenizers of the `tokenizers` library: `tokenizer.json`, and GPT-2's `vocab.json` with `merges.txt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flashinfer.errors import StoreError
from flashinfer.text.config import TokenizerConfig, read_json
from flashinfer.text.pieces import BYTE_LEVEL, PieceDecoder, read_decoder
from flashinfer.text.tokenizer import Tokenizer

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library; what surrounds a sequence is its post-processor's affair."""

    def __init__(self, library: tokenizers.Tokenizer, pieces: PieceDecoder, config: TokenizerConfig) -> None:
        library.no_truncation()
        library.no_padding()
        self._library, self._pieces = library, pieces
        added = library.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self._special = frozenset(self.specials.values())
        self.base_size = library.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max([library.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
        self.strips_leading_space = pieces.strips_leading_space
        self.bos_id = self._id_of(config.bos)
        if self.bos_id is None:
            self.bos_id = next(iter(library.encode("").ids), None)
        eos = self._id_of(config.eos)
        self.eos_ids = () if eos is None else (eos,)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._library.token_to_id(token)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = self._library.encode(text, add_special_tokens=add_bos).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        piece = None if token < 0 or token in self._special else self._library.id_to_token(token)
        return b"" if piece is None else self._pieces(piece)


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The part of a `tokenizer.json` the library does not tell."""

    decoder: dict[str, Any] | None = None


def tokenizer_from_json(path: Path, config: TokenizerConfig) -> LibraryTokenizer:
    """Open a `tokenizer.json`.

    Raises:
        StoreError: damaged, or of a kind that cannot be read.
    """
    pieces = read_decoder(read_json(path, _TokenizerFile).decoder, str(path))
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise StoreError(f"{path} is not a readable tokenizer ({e}); download it again, then pack again") from e
    return LibraryTokenizer(library, pieces, config)


def tokenizer_from_vocab(vocab: Path, merges: Path, config: TokenizerConfig) -> LibraryTokenizer:
    """Open a byte-level BPE given as `vocab.json` and `merges.txt` (GPT-2, OPT, Qwen2).

    Raises:
        StoreError: damaged, or a tokenizer class whose way of splitting is not in those two files.
    """
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as e:  # the library raises bare Exception
        raise StoreError(f"{vocab} with {merges} is not a readable vocabulary ({e}); pack the checkpoint again") from e
    library = tokenizers.Tokenizer(model)
    _set_splitting(library, config, vocab)
    library.decoder = decoders.ByteLevel()
    _add_tokens(library, config, vocab)
    bos = config.bos if config.add_bos_token else None
    if bos is not None:
        bos_id = library.token_to_id(bos)
        library.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return LibraryTokenizer(library, BYTE_LEVEL, config)


def _set_splitting(library: tokenizers.Tokenizer, config: TokenizerConfig, vocab: Path) -> None:
    prefix = bool(config.add_prefix_space)
    match (config.tokenizer_class or "GPT2Tokenizer").removesuffix("Fast"):
        case "GPT2Tokenizer" | "CodeGenTokenizer":
            library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        case "Qwen2Tokenizer":
            split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), behavior="isolated")
            rest = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
            library.normalizer = normalizers.NFC()
            library.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
        case other:
            raise StoreError(
                f"{vocab}: how a {other} splits text is not in vocab.json; "
                "save a tokenizer.json with transformers (tokenizer.save_pretrained), then pack again"
            )


def _add_tokens(library: tokenizers.Tokenizer, config: TokenizerConfig, vocab: Path) -> None:
    for expected, token in sorted(config.added().items()):
        library.add_tokens([tokenizers.AddedToken(token.content, special=token.special, normalized=False)])
        if library.token_to_id(token.content) != expected:
            raise StoreError(
                f"{vocab}: token {token.content!r} should have id {expected}, it has id "
                f"{library.token_to_id(token.content)}; it does not belong to this tokenizer_config.json"
            )
    library.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in config.specials()])
