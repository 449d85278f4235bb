"""The small JSON files beside a tokenizer: which special tokens it has and when they are added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from flashinfer.errors import StoreError


class _Token(msgspec.Struct, frozen=True):
    """A special token written as an object; other keys are ignored."""

    content: str
    special: bool = False


class SpecialTokens(msgspec.Struct, frozen=True):
    """`special_tokens_map.json`, the keys used here."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    pad_token: str | _Token | None = None


class NamedTemplate(msgspec.Struct, frozen=True):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(SpecialTokens, frozen=True):
    """`tokenizer_config.json`, the keys used here."""

    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added_tokens_decoder: dict[str, _Token] = {}
    chat_template: str | list[NamedTemplate] | None = None

    def content(self, token: str | _Token | None) -> str | None:
        """The text of a special token, however it was written."""
        return token.content if isinstance(token, _Token) else token

    @property
    def bos(self) -> str | None:
        """Text of the token that begins a sequence."""
        return self.content(self.bos_token)

    @property
    def eos(self) -> str | None:
        """Text of the token that ends a sequence."""
        return self.content(self.eos_token)

    def specials(self) -> list[str]:
        """Texts of all special tokens named here, each once."""
        named = (self.bos_token, self.eos_token, self.unk_token, self.pad_token)
        added = (t.content for t in self.added_tokens_decoder.values() if t.special)
        return list(dict.fromkeys([*filter(None, map(self.content, named)), *added]))

    def added(self) -> dict[int, _Token]:
        """Tokens beside those of the vocabulary file, by id."""
        return {int(i): token for i, token in self.added_tokens_decoder.items() if i.isdecimal()}


T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """Parse a JSON file into `kind`.

    Raises:
        StoreError: unreadable, not JSON, or of other types than `kind` declares.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise StoreError(f"{path}: {e}; the file is damaged: pack the checkpoint again") from e
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror or e}; pack the checkpoint again") from e


def read_tokenizer_config(files: Mapping[str, Path]) -> TokenizerConfig:
    """`tokenizer_config.json` completed by `special_tokens_map.json`; all defaults where both are absent.

    Raises:
        StoreError: one of them is damaged.
    """
    config = TokenizerConfig()
    if path := files.get("tokenizer_config.json"):
        config = read_json(path, TokenizerConfig)
    if path := files.get("special_tokens_map.json"):
        extra = read_json(path, SpecialTokens)
        missing = {k: getattr(extra, k) for k in extra.__struct_fields__ if getattr(config, k) is None}
        config = msgspec.structs.replace(config, **missing)
    return config
