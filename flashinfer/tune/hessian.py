"""H = X^T X of what comes into the matrices of a layer, and the layer rounded by it (`gptq`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from flashinfer.errors import QuantError
from flashinfer.quant import Codec, Grouped
from flashinfer.store import Facts
from flashinfer.tune.gptq import Columns, Rows, damp, factorise, falling, round_rows
from flashinfer.tune.layerwise import Layer

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]

DOWN = "ffn.down.weight"
_STRIP = 512
"""Rows of H added to at once."""


class Hessians:
    """A listener (`layerwise.Listener`) that adds up X^T X, float32, for each input that matrices share."""

    def __init__(self, facts: Facts, parts: Mapping[str, Codec]) -> None:
        """parts: whose inputs are wanted, by part their codecs."""
        self.sharing = inputs_of(facts, parts)
        """By the part that is heard, those that share its input."""
        widths = {part: width_of(facts, part) for part in self.sharing}
        self._sums: dict[str, F32] = {part: np.zeros((n, n), dtype=np.float32) for part, n in widths.items()}

    def __call__(self, part: str, x: F32) -> None:
        """Add inputs `[tokens, columns]`."""
        h = self._sums.get(part)
        for first in range(0, 0 if h is None else len(h), _STRIP):
            assert h is not None
            h[first : first + _STRIP] += x[:, first : first + _STRIP].T @ x

    def take(self, part: str) -> F32:
        """The sum of a part that is heard; it is kept no longer."""
        return self._sums.pop(part)


def inputs_of(facts: Facts, parts: Mapping[str, Codec]) -> dict[str, list[str]]:
    """Parts, given with their codecs, of which errors are made up for: by the part whose input they share. Pure."""
    decision = f"ffn.{facts.decision}.weight"
    shared = {
        "attn.k.weight": "attn.q.weight", "attn.v.weight": "attn.q.weight",
        "ffn.gate.weight": decision, "ffn.up.weight": decision,
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for part, codec in parts.items():
        if propagates(part, codec):
            found.setdefault(shared.get(part, part), []).append(part)
    return found


def width_of(facts: Facts, part: str) -> int:
    """Columns of what comes into a part. Pure."""
    others = {"attn.o.weight": facts.num_heads * facts.head_dim, DOWN: facts.intermediate_size}
    return others.get(part, facts.hidden_size)


def propagates(part: str, codec: Codec) -> bool:
    """Whether errors are made up for in that matrix: where its codec has codes, of which a column's can be chosen for
    themselves; those of down belong to a neuron, which is rounded as a whole."""
    return isinstance(codec, Grouped) or (part == DOWN and codec.name == "int8g32")


def round_layer(
    layer: Layer, codecs: Mapping[str, Codec], hessians: Hessians | None = None, *, act_order: bool = True
) -> dict[str, Bytes]:
    """Round the matrices of a layer to their codecs, with `hessians` by GPTQ, else each value to the nearest.

    Writes `layer`, whose values are those of the result afterwards: by part, `[rows, bytes]`.

    Raises:
        QuantError: a value does not fit its codec, or H is singular.
    """
    done: dict[str, Bytes] = {}
    for heard, parts in ({} if hessians is None else hessians.sharing).items():
        assert hessians is not None
        h = hessians.take(heard)
        order = falling(h) if act_order else np.arange(len(h))
        u = _factor(h[np.ix_(order, order)], layer, heard)
        del h
        for part in parts:
            with _fitting(layer, part, codecs[part]):
                done[part] = _propagated(layer.matrix(part), part, codecs[part], u, order)
    for part in codecs.keys() - done.keys():
        with _fitting(layer, part, codecs[part]):
            done[part] = codecs[part].encode(np.ascontiguousarray(layer.matrix(part)))
    for part, data in done.items():
        values = layer.matrix(part)
        values[:] = codecs[part].decode(data, values.shape[1])
    return done


def _factor(h: F32, layer: Layer, heard: str) -> F32:
    damp(h)
    try:
        return factorise(h)
    except np.linalg.LinAlgError as e:
        raise QuantError(
            f"the text says too little of what comes into {heard} of layer {layer.number}: its Hessian is singular, "
            "even damped; give a longer text, or leave out --gptq"
        ) from e


def _propagated(values: F32, part: str, codec: Codec, u: F32, order: Index) -> Bytes:
    """A matrix by GPTQ; its inputs in that order."""
    if part == DOWN:
        rounding: Rows | Columns = Rows(codec, values)
        m = np.take(values, order, axis=0)
    else:
        assert isinstance(codec, Grouped)
        rounding = Columns(codec, np.ascontiguousarray(values))
        m = np.take(values.T, order, axis=0)
    round_rows(m, u, lambda k, wanted: rounding.rounded(int(order[k]), wanted))
    return rounding.encoded()


@contextmanager
def _fitting(layer: Layer, part: str, codec: Codec) -> Iterator[None]:
    """Map an OverflowError of the block."""
    try:
        yield
    except OverflowError as e:
        raise QuantError(f"layers.{layer.number}.{part} does not fit {codec.name}: {e}") from e
