"""What everybody processes: the first tokens of a text are the prompt, the next ones are forced."""

from __future__ import annotations

from pathlib import Path

from flashinfer.errors import PromptError, TextError
from flashinfer.store import Store
from flashinfer.text import load_tokenizer
from flashinfer.tune.text import read_tokens

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one or other of their daughters. \u201cMy dear Mr. Bennet,\u201d said his lady to him one day, \u201chave "
    "you heard that Netherfield Park is let at last?\u201d Mr. Bennet replied that he had not. \u201cBut it is,\u201d "
    "returned she; \u201cfor Mrs. Long has just been here, and she told me all about it.\u201d Mr. Bennet made no "
    "answer. \u201cDo not you want to know who has taken it?\u201d cried his wife, impatiently. \u201cYou want to tell "
    "me, and I have no objection to hearing it.\u201d This was invitation enough."
)
"""Where no text is given: the beginning of Jane Austen's Pride and Prejudice (1813)."""


def forced_tokens(store: Store, text: Path | None, prompt: int, tokens: int) -> tuple[list[int], list[int]]:
    """Prompt and script, so many ids each, by the store's tokenizer; BOS comes first where the tokenizer puts it.

    Raises:
        TextError: the text cannot be read, or has fewer tokens. StoreError: the store has no tokenizer.
        PromptError: an id lies beyond the model's vocabulary.
    """
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    begin = (
        [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id] else []
    )
    if text is None:
        ids = tokenizer.encode(TEXT, add_bos=False)
    else:
        ids = [int(i) for i in read_tokens(text, tokenizer, prompt + tokens).ids]
    ids = [*begin, *ids][: prompt + tokens]
    if len(ids) < prompt + tokens:
        where = "the built-in text" if text is None else str(text)
        raise TextError(f"{where} has {len(ids)} tokens, {prompt} + {tokens} are wanted; give a longer one with --text")
    if max(ids) >= store.manifest.facts.vocab_size:
        raise PromptError(f"the tokenizer gives id {max(ids)}, the model has {store.manifest.facts.vocab_size} tokens")
    return ids[:prompt], ids[prompt:]
