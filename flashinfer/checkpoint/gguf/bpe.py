"""A byte-level BPE vocabulary as `tokenizer.json`.

How a text is split before merging is named in `tokenizer.ggml.pre`; the regular expressions are those of llama.cpp
(src/llama-vocab.cpp), which are those of the models' own tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flashinfer.checkpoint.gguf.vocabulary import CONTROL, USER_DEFINED, Vocabulary

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BREAKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_letters(digits: str) -> str:
    """As GPT-4 (cl100k) splits; so many digits together."""
    return rf"{_ENDING}|{_BEFORE}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_BREAKS}"


def _by_case(ending: str, digits: str) -> str:
    """As GPT-4o (o200k) splits, where a capital begins a word."""
    words = f"{_BEFORE}{_UPPER}*{_LOWER}+{ending}|{_BEFORE}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_BREAKS}"


@dataclass(frozen=True)
class Splitting:
    """`patterns` split the text one after the other, each what the last has left; `nfc`: it is normalised before.

    `ignore_merges`: a part that is a token is taken as it is. `add_bos`: a text begins with it unless the file says no.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CL100K = Splitting((_by_letters("{1,3}"),))
_LLAMA3 = replace(_CL100K, ignore_merges=True, add_bos=True)
_QWEN2 = Splitting((_by_letters(""),), nfc=True)
_DIGITS_APART = Splitting((r"\p{N}", _GPT2))
_O200K = Splitting((_by_case(f"{_ENDING}?", "{1,3}"),))
_TEKKEN = Splitting((_by_case("", ""),), ignore_merges=True, add_bos=True)
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting((_GPT2,)),
    "phi-2": Splitting((_GPT2,)),
    "mpt": Splitting((_GPT2,), nfc=True),
    "olmo": Splitting((_GPT2,), nfc=True),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _CL100K,
    "dbrx": _CL100K,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "smollm": _DIGITS_APART,
    "gpt-4o": _O200K,
    "tekken": _TEKKEN,
    "bloom": Splitting((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)),
    "deepseek-coder": Splitting(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}
"""By `tokenizer.ggml.pre`."""
_UNSAID = {"gpt2": "gpt-2", "gptneox": "mpt", "mpt": "mpt", "falcon": "falcon"}
"""What files have that are older than that key, by `general.architecture`."""


def splitting_of(metadata: Mapping[str, Any]) -> Splitting:
    """How the file's tokenizer splits a text. Raises ValueError: in a way that is not known, or it does not say."""
    name = metadata.get("tokenizer.ggml.pre", _UNSAID.get(str(metadata.get("general.architecture"))))
    if not isinstance(name, str) or name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise ValueError(
            f"it says tokenizer.ggml.pre = {str(name)[:40]!r}, known are {known}: get the model as safetensors"
        )
    return SPLITTINGS[name]


def bpe_file(vocabulary: Vocabulary, splitting: Splitting, *, add_bos: bool) -> bytes:
    """The content of tokenizer.json.

    Raises:
        ValueError: a token occurs twice, or a merge is none.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [(m[: m.find(" ", 1)], m[m.find(" ", 1) + 1 :]) for m in vocabulary.merges]
    if len(ids) < len(vocabulary.tokens):
        raise ValueError("a token of its tokenizer occurs twice: it is damaged")
    try:
        library = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.ignore_merges))
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"its vocabulary makes no BPE ({e}): it is damaged") from e
    if splitting.nfc:
        library.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in splitting.patterns]
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_apart])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(_added(vocabulary, CONTROL))
    library.add_tokens(_added(vocabulary, USER_DEFINED))
    bos = vocabulary.special.get("bos")
    if add_bos and bos is not None:
        token = vocabulary.tokens[bos]
        library.post_processor = processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, bos)])
    return library.to_str().encode()


def _added(vocabulary: Vocabulary, kind: int) -> list[tokenizers.AddedToken]:
    """Tokens of a type, found in a text before it is split."""
    return [
        tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, its_kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if its_kind == kind and token
    ]
