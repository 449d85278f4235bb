"""Whether a tokenizer belongs to a model: asked when a checkpoint is packed, and when a store is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashinfer.errors import StoreError
from flashinfer.text.load import has_tokenizer, load_tokenizer
from flashinfer.text.tokenizer import Tokenizer


def check_fit(tokenizer: Tokenizer, rows: int, where: str | Path) -> None:
    """Refuse another model's tokenizer. Added tokens without a row are only refused when they occur.

    Args:
        tokenizer: of the store or checkpoint.
        rows: of the model's embedding.
        where: the store or checkpoint, for the error.

    Raises:
        StoreError: it has more tokens than there are rows.
    """
    if tokenizer.base_size > rows:
        raise StoreError(
            f"{where}: its tokenizer has {tokenizer.base_size} tokens, its embedding {rows}: they do not belong "
            "together; put the model's own tokenizer into the checkpoint, then pack again"
        )


def check_files(files: Mapping[str, Path], rows: int, where: str | Path) -> None:
    """The same for the text files of a checkpoint, which may have no tokenizer.

    Raises:
        StoreError: the tokenizer is damaged or of a kind that is not read, or it does not fit.
    """
    if has_tokenizer(files):
        check_fit(load_tokenizer(files), rows, where)
