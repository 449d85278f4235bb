"""Weights of a store as they will be in other codecs: encoded on the way, or beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flashinfer.errors import QuantError
from flashinfer.quant import LlmInt8, codec_named
from flashinfer.store import Store
from flashinfer.store.neurons import Bytes, Chosen
from flashinfer.store.roles import ffn_role, outliers_role
from flashinfer.tune.gather import Source

Prepared = Callable[[int], Mapping[str, Bytes]]
"""Of a layer, the matrices that are encoded already, by role: all rows, `[rows, bytes]`."""


class Recoded(Source):
    """See `gather.Source`. Matrices whose role is in `codecs` come in that codec, each row rounded to nearest as the
    codec's rule has it; those that are `prepared`, as they were.

    Raises QuantError where a value does not fit its codec.
    """

    def __init__(
        self,
        store: Store,
        codecs: Mapping[str, str],
        outliers: Mapping[str, tuple[int, ...]] | None = None,
        prepared: Prepared = lambda layer: {},
    ) -> None:
        """outliers: columns by their role, of each input of an `llm.int8` matrix."""
        super().__init__(store)
        self.codecs = dict(codecs)
        used = {outliers_role(role) for role, codec in codecs.items() if codec == LlmInt8.name}
        self.outliers = {role: columns for role, columns in (outliers or {}).items() if role in used}
        self._prepared, self._kept = prepared, (-1, dict[str, Bytes]())

    def tensor_chunks(self, role: str) -> Iterator[memoryview]:
        """A dense tensor from end to end."""
        if role in self.codecs:
            yield from (rows.data.cast("B") for _, rows in self.row_blocks(role))
        else:
            yield from super().tensor_chunks(role)

    def rows(self, role: str, chosen: Chosen) -> Bytes:
        """These rows of a dense matrix."""
        if (kept := self._prepared_rows(role)) is not None:
            return kept[chosen]
        t = self.manifest.tensors[role]
        return self._recoded(super().rows(role, chosen), t.codec, t.shape[-1], role)

    def bundled(self, layer: int, chosen: Chosen, wanted: Sequence[str]) -> dict[str, Bytes]:
        """Those of the wanted parts that are in the bundles."""
        found = dict[str, Bytes]()
        for p in self.manifest.layers[layer].parts:
            role = ffn_role(layer, p.role)
            if p.role in wanted and (kept := self._prepared_rows(role)) is not None:
                found[p.role] = kept[chosen]
        others = super().bundled(layer, chosen, [part for part in wanted if part not in found])
        for p in self.manifest.layers[layer].parts:
            if p.role in others:
                found[p.role] = self._recoded(others[p.role], p.codec, p.elements, ffn_role(layer, p.role))
        return found

    def _recoded(self, rows: Bytes, codec: str, elements: int, role: str) -> Bytes:
        """Rows in the codec of their role. Raises QuantError where a value does not fit."""
        if role not in self.codecs:
            return rows
        try:
            return self.codec(role).encode(codec_named(codec).decode(rows, elements))
        except OverflowError as e:
            raise QuantError(f"tensor {role} does not fit {self.codecs[role]}: {e}") from e

    def _prepared_rows(self, role: str) -> Bytes | None:
        if role not in self.codecs or not role.startswith("layers."):
            return None
        layer = int(role.split(".")[1])
        if self._kept[0] != layer:
            self._kept = (-1, {})  # the old ones go before the new ones come
            self._kept = (layer, dict(self._prepared(layer)))
        return self._kept[1].get(role)
