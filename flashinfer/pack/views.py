"""A checkpoint whose tensors are those a layout cuts out of it, beside its own. Read on demand, like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flashinfer.checkpoint import Checkpoint, TensorInfo
from flashinfer.checkpoint.base import Bytes, Coded, Columns, Words
from flashinfer.errors import CheckpointError
from flashinfer.layout.view import Index, Joined, View
from flashinfer.pack.joined import joined_codes, read_joined
from flashinfer.quant import codec_named


class Views:
    """See `checkpoint.Checkpoint`. Closing it closes the checkpoint.

    Rows of a view are read as the span of the checkpoint's rows that holds them: no more than they are times what a
    fused tensor holds beside them.
    """

    def __init__(self, source: Checkpoint, views: Mapping[str, View | Joined]) -> None:
        self._source, self._views = source, views
        self.path, self.config, self.text = source.path, source.config, source.text
        cut = {name: TensorInfo(name, self._dtype(view), view.shape, self._coded(view)) for name, view in views.items()}
        self.tensors: Mapping[str, TensorInfo] = {**source.tensors, **cut}

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """See `Checkpoint.read_rows`."""
        view = self._views.get(name)
        if view is None:
            return self._source.read_rows(name, start, stop)
        if isinstance(view, Joined):
            return read_joined(self._source, view, start, stop)
        if len(view.shape) == 1:
            return self._vector(view)
        return self._rows(view, view.rows[start:stop])

    def read_columns(self, name: str, columns: Columns) -> Words:
        """See `Checkpoint.read_columns`."""
        view = self._views.get(name)
        if view is None:
            return self._source.read_columns(name, columns)
        if isinstance(view, Joined):
            assert isinstance(columns, slice), "experts have no other order"
            return read_joined(self._source, view, *columns.indices(view.shape[-1])[:2])
        if len(view.shape) == 1:
            return self._vector(view)[:, columns]
        if not view.transposed:
            return self._source.read_columns(view.names[0], columns)[view.rows]
        return self._chosen(view, columns).T[view.rows].copy()

    def will_need(self, name: str) -> None:
        """See `Checkpoint.will_need`."""
        for each in self._views[name].names if name in self._views else (name,):
            self._source.will_need(each)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._source.close()

    def _dtype(self, view: View | Joined) -> str:
        """What is added to is float32 from there on. Raises CheckpointError: experts of several types."""
        if isinstance(view, View) and view.plus:
            return "f32"
        found = {self._source.tensors[name].dtype: name for name in view.names}
        if len(found) > 1:
            raise CheckpointError(
                f"tensors {' and '.join(found.values())} are {' and '.join(found)}; experts of one layer are packed "
                "together: convert them to one type"
            )
        return next(iter(found))

    def _coded(self, view: View | Joined) -> Coded | None:
        """Rows of codes are cut out as rows of values are; those of the transpose are none."""
        if isinstance(view, Joined):
            return joined_codes(self._source, view)
        coded = self._source.tensors[view.names[0]].coded
        if coded is None or view.transposed:
            return None if coded is None else replace(coded, codec=None)

        def rows(start: int, stop: int) -> Bytes:
            wanted = view.rows[start:stop]
            first, last = int(wanted.min()), int(wanted.max()) + 1
            return coded.rows(first, last)[wanted - first]

        return replace(coded, rows=rows)

    def _rows(self, view: View, rows: Index) -> Words:
        """Those rows of the checkpoint's matrix (once transposed), in that order."""
        name, first, last = view.names[0], int(rows.min()), int(rows.max()) + 1
        if view.transposed:
            return self._source.read_columns(name, slice(first, last)).T[rows - first].copy()
        return self._source.read_rows(name, first, last)[rows - first]

    def _chosen(self, view: View, columns: Columns) -> Words:
        """The rows of the checkpoint's matrix that are those columns of the view, which is transposed."""
        if isinstance(columns, slice):
            first, last, _ = columns.indices(view.shape[1])
            return self._source.read_rows(view.names[0], first, last)
        rows: Words = np.concatenate([self._source.read_rows(view.names[0], int(n), int(n) + 1) for n in columns])
        return rows

    def _vector(self, view: View) -> Words:
        """All of a vector, `[1, length]`."""
        infos = [self._source.tensors[name] for name in view.names]
        parts: list[Any] = [self._source.read_rows(i.name, 0, i.matrix[0]).reshape(-1) for i in infos]
        words: Words = np.concatenate(parts)[view.rows].reshape(1, -1)
        if not view.plus:
            return words
        values = codec_named(infos[0].dtype).decode(words.view(np.uint8), words.shape[1])
        return (values + np.float32(view.plus)).view("<u4")
