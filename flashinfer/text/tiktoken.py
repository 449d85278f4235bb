"""Llama 3's `tokenizer.model`: a vocabulary of tiktoken, one token (base64) and its rank a line."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from flashinfer.errors import StoreError
from flashinfer.text.config import TokenizerConfig
from flashinfer.text.hf import LibraryTokenizer
from flashinfer.text.pieces import BYTE_LEVEL, BYTE_OF

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BOS, _EOS, _END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_SPECIALS = 256
_ALPHABET = {byte: character for character, byte in BYTE_OF.items()}


def tokenizer_from_tiktoken(path: Path, config: TokenizerConfig) -> LibraryTokenizer:
    """Open a tiktoken vocabulary as Meta's Llama 3 reads it (`llama/tokenizer.py` of meta-llama/llama3).

    Special tokens follow the ranks: those of `tokenizer_config.json`, else the 256 of Llama 3.

    Raises:
        StoreError: unreadable, damaged, or special tokens that do not follow.
    """
    ranks = _read_ranks(path)
    library = tokenizers.Tokenizer(models.BPE(*vocabulary_and_merges(ranks), fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
    library.decoder = decoders.ByteLevel()
    added = {i: token.content for i, token in config.added().items() if i >= len(ranks)}
    specials = [added[i] for i in sorted(added)] or llama3_specials()
    if added and sorted(added) != list(range(len(ranks), len(ranks) + len(added))):
        raise StoreError(
            f"{path}: it has {len(ranks)} tokens, but the special tokens of tokenizer_config.json do not follow them; "
            "they do not belong together"
        )
    library.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in specials])
    bos = config.bos or _BOS
    bos_id = library.token_to_id(bos)
    if config.add_bos_token is not False and bos_id is not None:
        library.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    tokenizer = LibraryTokenizer(library, BYTE_LEVEL, msgspec.structs.replace(config, bos_token=bos))
    if not tokenizer.eos_ids:
        ends = [library.token_to_id(t) for t in (_EOS, _END_OF_TURN)]
        tokenizer.eos_ids = tuple(i for i in ends if i is not None)
    return tokenizer


def llama3_specials() -> list[str]:
    """Llama 3's special tokens in the order of their ids, the first of which follows the last rank."""
    named = {0: _BOS, 1: _EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: _END_OF_TURN}
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(_SPECIALS))
    return [named[i] if i in named else next(reserved) for i in range(_SPECIALS)]


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ranks as a byte-level vocabulary and its merges, as transformers' `TikTokenConverter` makes them.

    tiktoken merges whichever neighbours make the token of lowest rank. So each way to cut a token into two is a
    merge, and merges are ordered by the rank of what they make.
    """
    vocabulary = {token.decode("latin-1").translate(_ALPHABET): rank for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(vocabulary[a], vocabulary[b], a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        merges += [(a, b) for _, _, a, b in sorted(pairs)]
    return vocabulary, merges


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        rows = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as e:
        raise _damaged(path, str(e)) from e
    if set(ranks.values()) != set(range(len(rows))):
        raise _damaged(path, f"{len(rows)} lines, but not one for each of as many ranks")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _damaged(path, f"byte {missing[0]} has no token")
    return ranks


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path} is not a readable tiktoken vocabulary ({reason}); download it again, then pack again")
