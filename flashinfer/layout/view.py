"""How a role is cut out of a checkpoint's tensors: which rows, in which order, transposed or not. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class View:
    """A tensor of `shape` made of the tensors `names`: one of them, or several vectors one after the other.

    `transposed`: they are `[in, out]`. `rows`: which rows of theirs (once transposed), in this order; of vectors, which
    elements of all together. `plus` is added to every value (vectors only).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: Index
    transposed: bool = False
    plus: float = 0.0


def taken_rows(total: int, groups: int, start: int, stop: int) -> Index:
    """Rows `[start, stop)` of each of `groups` equal parts of `total` rows. Raises ValueError where they cannot be."""
    if groups < 1 or total % groups or not 0 <= start < stop <= total // groups:
        raise ValueError(f"rows {start}..{stop} of {groups} parts of {total} rows")
    return (np.arange(groups)[:, None] * (total // groups) + np.arange(start, stop)).reshape(-1)


def in_halves(rows: Index, head_dim: int, rotary_dim: int, *, last: bool = False) -> Index:
    """Rows of whole heads whose rotary pairs lie side by side (GPT-J), as the halves convention wants them: first in
    their head, wherever they were (`last`: at its end, as in DeepSeek).

    Raises ValueError where they are no whole heads.
    """
    if len(rows) % head_dim:
        raise ValueError(f"{len(rows)} rows are no whole heads of {head_dim}")
    turned = np.arange(rotary_dim).reshape(-1, 2).T.reshape(-1)
    rest = np.arange(head_dim - rotary_dim)
    order = np.concatenate([turned + len(rest), rest] if last else [turned, rest + rotary_dim])
    return rows.reshape(-1, head_dim)[:, order].reshape(-1)


@dataclass(frozen=True)
class Block:
    """A matrix within a tensor: of the tensor's rows, of all its axes but the last together, `count` from `first` on;
    turned over where `transposed`; of that each `step`-th row from `start` on, `rows` of them."""

    name: str
    first: int
    count: int
    rows: int
    transposed: bool = False
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class Joined:
    """A tensor of `shape` whose neurons are those of `blocks`, one block's after the other's; `sizes` are theirs.

    `columns`: neurons are its columns, not its rows. Of a vector each is a value, and blocks have one column.
    """

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    columns: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it is made of."""
        return tuple(dict.fromkeys(block.name for block in self.blocks))
