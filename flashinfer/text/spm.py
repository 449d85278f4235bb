"""Tokenizers of sentencepiece: `tokenizer.model`."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import sentencepiece

from flashinfer.errors import StoreError
from flashinfer.text.config import TokenizerConfig
from flashinfer.text.pieces import SPACE_MARK, PieceDecoder
from flashinfer.text.tokenizer import Tokenizer

_PIECES = PieceDecoder(byte_fallback=True, replacements=((SPACE_MARK, " "),))
# In protobuf the last value of a field counts, so appending `normalizer_spec { add_dummy_prefix: false }`
# to a model gives the same model without the space before the text.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model as transformers' llama uses it.

    Special tokens written in the text become their ids, which sentencepiece alone does not do. Only
    the start of the text gets the dummy prefix (every part between special tokens, where `legacy`).
    """

    def __init__(self, model: bytes, config: TokenizerConfig) -> None:
        self._bytes = model
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._every_part_prefixed = bool(config.legacy)
        self._adds_bos = config.add_bos_token is not False
        self.strips_leading_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        size = self._model.get_piece_size()
        self._added = {i: token for i, token in config.added().items() if i >= size and token.content}
        self.specials = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        self.specials |= {token.content: i for i, token in self._added.items()}
        longest_first = sorted(map(re.escape, self.specials), key=len, reverse=True)
        self._split = re.compile("|".join(longest_first) or r"(?!)")
        self.base_size = size
        self.vocab_size = max([size, *(i + 1 for i in self._added)])
        self.bos_id = self._id_of(config.bos, self._model.bos_id())
        eos = self._id_of(config.eos, self._model.eos_id())
        self.eos_ids = () if eos is None else (eos,)

    @cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the dummy prefix; loaded only for texts that need it, it costs memory."""
        return sentencepiece.SentencePieceProcessor(model_proto=self._bytes + _NO_DUMMY_PREFIX)

    def _id_of(self, token: str | None, default: int) -> int | None:
        if token is not None and token in self.specials:
            return self.specials[token]
        return default if default >= 0 else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        ids = [self.bos_id] if add_bos and self._adds_bos and self.bos_id is not None else []
        at = 0
        for special in self._split.finditer(text):
            ids += self._encode_part(text[at : special.start()], at == 0)
            ids.append(self.specials[special[0]])
            at = special.end()
        return ids + self._encode_part(text[at:], at == 0)

    def _encode_part(self, part: str, first: bool) -> list[int]:
        model = self._model if first or self._every_part_prefixed else self._bare
        ids: list[int] = model.encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else added.content.encode()
        if not 0 <= token < self._model.get_piece_size():
            return b""
        if self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        try:
            return _PIECES(self._model.id_to_piece(token))
        except UnicodeDecodeError as e:
            raise StoreError(f"token {token} of tokenizer.model is no text; run `flashinfer verify`") from e


def tokenizer_from_sentencepiece(path: Path, config: TokenizerConfig) -> SentencePieceTokenizer:
    """Open a `tokenizer.model`.

    Raises:
        StoreError: unreadable or damaged.
    """
    try:
        return SentencePieceTokenizer(path.read_bytes(), config)
    except (RuntimeError, ValueError, UnicodeDecodeError) as e:
        raise StoreError(f"{path} is not a readable sentencepiece model; download it again, then pack again") from e
