"""What the rest of the program knows of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping


class Tokenizer(ABC):
    """Text to token ids and back.

    Decoding rests on one primitive, `token_bytes`: a token stands for the same bytes wherever it
    occurs. So text can be streamed token by token and still be exactly `decode` of the whole.

    Attributes:
        vocab_size: one more than the highest id `encode` can return.
        base_size: the same without tokens that were added to the vocabulary, which a model may lack rows for.
        bos_id: the id that begins a sequence, None where the tokenizer has none.
        eos_ids: the ids that end a sequence, as far as the tokenizer's own files say.
        specials: ids of the special tokens by their text. Written out in a text they become these ids.
        strips_leading_space: a text's first space was put there by `encode` and is dropped by `decode`.
    """

    vocab_size: int
    base_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    specials: Mapping[str, int]
    strips_leading_space: bool

    @abstractmethod
    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it (`</s>`) become their ids.

        With `add_bos`, whatever this tokenizer puts around a sequence is added (nothing, for many).
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes (perhaps part of a character) a token stands for.

        Empty for special tokens and for ids the tokenizer does not know (padding of the vocabulary).
        """

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a token sequence; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(map(self.token_bytes, tokens))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")
