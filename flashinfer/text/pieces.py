"""From a vocabulary's piece to its bytes, as the `decoder` section of a `tokenizer.json` says.

Only decoders that treat each piece by itself are read; those of every known decoder-only family do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from flashinfer.errors import StoreError

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()
"""The byte each character of GPT-2's alphabet stands for."""


@dataclass(frozen=True)
class PieceDecoder:
    """How a piece is turned into bytes; `strips_leading_space` is about the text as a whole."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    joint: str = ""
    strips_leading_space: bool = False

    def __call__(self, piece: str) -> bytes:
        """Bytes of one piece."""
        if self.byte_level:
            data = [BYTE_OF.get(c) for c in piece]
            known = [b for b in data if b is not None]
            # an added token with characters outside the alphabet stands for itself
            return bytes(known) if len(known) == len(data) else piece.encode()
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        return (self.joint + piece).encode()


BYTE_LEVEL = PieceDecoder(byte_level=True)
"""GPT-2's decoder: each character of a piece is a byte."""


def read_decoder(section: dict[str, Any] | None, where: str) -> PieceDecoder:
    """The piece decoder a `tokenizer.json` declares.

    Raises:
        StoreError: a kind of decoder this program does not know; `where` names the file.
    """
    if section is None:  # the library joins with spaces when no decoder is declared
        return PieceDecoder(joint=" ", strips_leading_space=True)
    return _extend(PieceDecoder(), section, where)


def _extend(so_far: PieceDecoder, section: dict[str, Any], where: str) -> PieceDecoder:
    match section:
        case {"type": "Sequence", "decoders": list(parts)}:
            for part in parts:
                so_far = _extend(so_far, part, where)
            return so_far
        case {"type": "ByteLevel"}:
            return replace(so_far, byte_level=True)
        case {"type": "ByteFallback"}:
            return replace(so_far, byte_fallback=True)
        case {"type": "Fuse"}:
            return so_far
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return replace(so_far, replacements=(*so_far.replacements, (old, new)))
        case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
            return replace(so_far, strips_leading_space=so_far.strips_leading_space or start == 1)
        case {"type": "Metaspace", "replacement": str(mark)}:
            prepends = section.get("prepend_scheme", "always") != "never" and section.get("add_prefix_space", True)
            return replace(
                so_far, replacements=(*so_far.replacements, (mark, " ")), strips_leading_space=bool(prepends)
            )
    kind = section.get("type") if isinstance(section, dict) else section
    raise StoreError(f"{where}: its decoder {kind!r} is not supported; please report the model")
