"""A byte-level BPE vocabulary as `tokenizer.json`.

How a text is split before merging is named in `tokenizer.ggml.pre`; the regular expressions are those of llama.cpp
(src/llama-vocab.cpp), which are those of the models' own tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flashinfer.checkpoint.gguf.vocabulary import CONTROL, USER_DEFINED, Vocabulary

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """`patterns` split the text one after the other, each what the last has left; `nfc`: it is normalised before.

    `ignore_merges`: a part that is a token is taken as it is. `add_bos`: a text begins with it unless the file says no.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = Splitting((_MODERN.format(digits="{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = Splitting((_MODERN.format(digits=""),), nfc=True)
_DIGITS_APART = Splitting((r"\p{N}", _GPT2))
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting((_GPT2,)),
    "phi-2": Splitting((_GPT2,)),
    "mpt": Splitting((_GPT2,), nfc=True),
    "olmo": Splitting((_GPT2,), nfc=True),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "smollm": _DIGITS_APART,
}
"""By `tokenizer.ggml.pre`."""
_UNSAID = {"gpt2": "gpt-2", "gptneox": "mpt", "mpt": "mpt", "falcon": "falcon"}
"""What files have that are older than that key, by `general.architecture`."""


def splitting_of(metadata: Mapping[str, Any]) -> Splitting:
    """How the file's tokenizer splits a text. Raises ValueError: in a way that is not known, or it does not say."""
    name = metadata.get("tokenizer.ggml.pre", _UNSAID.get(str(metadata.get("general.architecture"))))
    if name not in SPLITTINGS:
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
