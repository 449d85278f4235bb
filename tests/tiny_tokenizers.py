"""Tiny tokenizers trained on the spot: one of each kind of file that `load_tokenizer` reads."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a little girl. She had a red ball.",
    "The dog ran to the park, and the cat ran after the dog!",
    "Grüße aus Köln: naïve café, 12345 times. \u4f60\u597d \U0001f600",
    "def main():\n    return 0\n",
]


def tiny_sentencepiece(folder: Path, **options: Any) -> dict[str, Path]:
    """A BPE model with byte fallback, as the llama family has: <unk> 0, <s> 1, </s> 2."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1,
        "eos_id": 2, "pad_id": -1, "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(settings | options))
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return {path.name: path}


def tiny_json(folder: Path, *, bos: bool = True) -> dict[str, Path]:
    """A byte-level BPE `tokenizer.json`: <s> 0, </s> 1; the post-processor adds <s> where `bos`."""
    library = _byte_level_bpe(["<s>", "</s>"])
    library.decoder = decoders.ByteLevel()
    if bos:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    library.save(str(path))
    config.write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return {path.name: path, config.name: config}


def tiny_llama_json(folder: Path) -> dict[str, Path]:
    """Llama's as a `tokenizer.json`: what is in no token falls back to bytes, and a text begins with a space."""
    marks = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = marks
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, limit_alphabet=40, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learnt["vocab"]]
    vocab, merges = {name: i for i, name in enumerate(names)}, [tuple(pair) for pair in learnt["merges"]]
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = marks
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    library.save(str(path))
    config.write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return {path.name: path, config.name: config}


def tiny_gpt2(folder: Path, **config: Any) -> dict[str, Path]:
    """A byte-level BPE as `vocab.json` and `merges.txt`, with OPT's `tokenizer_config.json`: </s> is 2."""
    library = _byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>"])
    vocab, merges = library.model.save(str(folder))
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", "content": "</s>"}, "eos_token": "</s>",
    }  # fmt: skip
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings | config))
    return {"vocab.json": Path(vocab), "merges.txt": Path(merges), path.name: path}


def tiny_tiktoken(folder: Path, *, tokens: int = 400) -> dict[str, Path]:
    """A `tokenizer.model` of tiktoken: every byte, then pairs and triples of the corpus, the frequent ones first."""
    data = "\n".join(CORPUS).encode()
    pairs = Counter(data[i : i + 2] for i in range(len(data) - 1))
    triples = Counter(data[i : i + 3] for i in range(len(data) - 2) if data[i : i + 2] in pairs)
    ranks = [bytes([b]) for b in range(256)]
    ranks += [token for token, _ in (*pairs.most_common(), *triples.most_common())]
    path = folder / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks[:tokens])))
    return {path.name: path}


def _byte_level_bpe(specials: list[str]) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library
