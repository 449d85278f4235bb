"""A vocabulary as a sentencepiece model, `tokenizer.model`.

The message is sentencepiece's ModelProto (src/sentencepiece_model.proto), written by hand: the generated class would
need protobuf, and a dozen fields are all there is to it.
"""

from __future__ import annotations

import struct

import sentencepiece

from flashinfer.checkpoint.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, Vocabulary

_BPE = 2
"""TrainerSpec.ModelType; what llama.cpp does with the tokenizer `llama`."""
_SPECIAL_PIECES = {"unknown": 45, "bos": 46, "eos": 47, "padding": 48}
"""Fields of TrainerSpec."""


def sentencepiece_file(vocabulary: Vocabulary, *, add_prefix: bool) -> bytes:
    """A BPE model (with byte fallback where it has bytes) that changes no text but for the space of `add_prefix`.

    Raises:
        ValueError: no such model can have this vocabulary.
    """
    unknown = vocabulary.special.get("unknown", 0)
    pieces = []
    for i, (token, score, kind) in enumerate(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)):
        if i == unknown:
            kind = UNKNOWN
        elif kind == UNKNOWN:
            kind = CONTROL  # sentencepiece allows one unknown piece
        pieces.append(_message(1, _text(1, token) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind)))
    falls_back = vocabulary.types.count(BYTE) > 0
    trainer = _number(3, _BPE) + _number(4, len(vocabulary.tokens)) + _number(35, falls_back) + _number(40, unknown)
    trainer += b"".join(_text(_SPECIAL_PIECES[key], vocabulary.tokens[i]) for key, i in vocabulary.special.items())
    normalizer = _text(1, "identity") + _number(3, add_prefix) + _number(4, 0) + _number(5, 1)
    model = b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise ValueError(f"its vocabulary makes no sentencepiece model ({e}): it is damaged") from e
    return model


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
