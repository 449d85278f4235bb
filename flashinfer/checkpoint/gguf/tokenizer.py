"""The tokenizer in a GGUF file, as the files a Hugging Face checkpoint would have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flashinfer.checkpoint.gguf.bpe import bpe_file, splitting_of
from flashinfer.checkpoint.gguf.spm import sentencepiece_file
from flashinfer.checkpoint.gguf.vocabulary import read_vocabulary


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content: the vocabulary, tokenizer_config.json, the chat template; nothing where there is none.

    What llama.cpp calls the tokenizer `llama` becomes a tokenizer.model (sentencepiece), `gpt2` a tokenizer.json.

    Raises:
        ValueError: it is damaged, or of a kind that is not read.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    vocabulary = read_vocabulary(metadata)
    if kind == "llama":
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        files = {"tokenizer.model": sentencepiece_file(vocabulary, add_prefix=bool(prefix))}
        # every part after a special token gets a space, as in llama.cpp
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    elif kind == "gpt2":
        splitting = splitting_of(metadata)
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", splitting.add_bos)
        files = {"tokenizer.json": bpe_file(vocabulary, splitting, add_bos=bool(add_bos))}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        raise ValueError(f"its tokenizer is {str(kind)[:40]!r}, llama and gpt2 are read: get the model as safetensors")
    config |= {"add_bos_token": bool(add_bos), **vocabulary.named()}
    files["tokenizer_config.json"] = json.dumps(config, indent=1, ensure_ascii=False).encode()
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files
