"""Weight deltas: a fine-tuned model published as its difference from the base (Vicuna, Alpaca, WizardLM)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashinfer.checkpoint.base import Checkpoint, Columns, Words
from flashinfer.checkpoint.sum import Floats, Piece, SumCheckpoint, floats, need_packable
from flashinfer.errors import CheckpointError

_COMPUTED = ".rotary_emb.inv_freq"
"""Buffers some versions of transformers saved; no layout reads them, and only one of the two may have them."""
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def add_delta(base: Checkpoint, delta: Checkpoint) -> Checkpoint:
    """The checkpoint whose every value is base + delta in float32, rounded to the base's type.

    Of names, shapes and number of tensors both must be alike. A delta with more vocabulary rows than its base is
    refused: tools that made such ones count the missing rows as zero (FastChat) or as the mean of the others
    (Stanford Alpaca), and nothing in the files says which. config.json is the delta's, and so are the text files it
    has; where it has a vocabulary of its own, none of the base's text files is taken.

    Raises:
        CheckpointError: the two do not belong together. The caller still owns both.
    """
    ours, theirs = _names(base), _names(delta)
    for name in sorted(ours ^ theirs):
        has, lacks = (base, delta) if name in ours else (delta, base)
        raise CheckpointError(
            f"tensor {name[:200]} is in {has.path} and not in {lacks.path}: give the base this delta was made from"
        )
    for name in ours:
        _check(base, delta, name)
    addends = {name: _Tensor(delta, name) for name in ours}
    return SumCheckpoint(base, delta, addends=addends, config=delta.config, text=_text(base, delta))


class _Tensor:
    """A tensor of the delta as an `Addend`."""

    def __init__(self, delta: Checkpoint, name: str) -> None:
        self._delta, self._name, self._dtype = delta, name, delta.tensors[name].dtype

    def rows(self, start: int, stop: int) -> Piece:
        """See `Addend.rows`."""
        return self._piece(self._delta.read_rows(self._name, start, stop))

    def columns(self, columns: Columns) -> Piece:
        """See `Addend.columns`."""
        return self._piece(self._delta.read_columns(self._name, columns))

    def _piece(self, words: Words) -> Piece:
        def piece(i: int, j: int) -> Floats:
            return floats(words[i:j], self._dtype)

        return piece


def _names(checkpoint: Checkpoint) -> set[str]:
    return {name for name in checkpoint.tensors if not name.endswith(_COMPUTED)}


def _check(base: Checkpoint, delta: Checkpoint, name: str) -> None:
    ours, theirs = base.tensors[name], delta.tensors[name]
    need_packable(ours, base.path)
    need_packable(theirs, delta.path)
    if ours.shape == theirs.shape:
        return
    what = f"tensor {name} has shape {list(theirs.shape)} in the delta {delta.path}, {list(ours.shape)} in {base.path}"
    if len(ours.shape) == 2 and ours.shape[1:] == theirs.shape[1:] and theirs.shape[0] > ours.shape[0]:
        more = theirs.shape[0] - ours.shape[0]
        raise CheckpointError(
            f"{what}: the base of its {more} added vocabulary rows is not recorded; apply the delta with the tool "
            "that made it, then pack the result"
        )
    raise CheckpointError(f"{what}: give the base this delta was made from")


def _text(base: Checkpoint, delta: Checkpoint) -> Mapping[str, Path]:
    if _VOCABULARIES & set(delta.text):
        return delta.text
    return {**base.text, **delta.text}
