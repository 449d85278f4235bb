"""Sketches: 8-bit copies of decision matrices that prove which neurons cannot fire; and the file predictors lie in.

A decision matrix that takes no more than eight bits itself is its own sketch: its products are the true ones, to the
bit, so nothing has to be proved, and `slack` is 0.

The proof. Let w be a row of the decision matrix, q its decoded sketch, x a token. Whatever the order of summation, a
float32 product of n values is off by at most `gamma |w| |x|`, gamma = n u / (1 - n u), u = 2**-24 (Higham, "Accuracy
and Stability of Numerical Algorithms", 3.1, and Cauchy-Schwarz; underflow, an absolute term, is left to the reader of
the slack). So the true product is at most that of the sketch plus `(|w - q| + gamma |w| + gamma |q|) |x|`. `slack` is
more than that factor of |x|: gamma is taken twice, and for n + 8 values, which covers the reader's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.quant import codec_named
from flashinfer.store import Facts, FileEntry, Store, StoreUpdate, TensorEntry
from flashinfer.store.dense import DensePlan, DenseTensor, plan_dense, write_dense
from flashinfer.store.neurons import Bytes
from flashinfer.store.progress import Meter, Progress
from flashinfer.store.roles import all_roles, ffn_role, sketch_codec, sketch_role
from flashinfer.tune.gather import Source

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_PIECE = 1 << 18
"""Values sketched at once: small enough for the processor's cache, in float64, too."""
_LARGEST = 127 * 65504.0
"""The range of int8g32; what lies beyond is cut off, and the slack knows."""


def sketch_rows(rows: F32) -> tuple[Bytes, F32]:
    """Finite rows `[n, hidden]` -> their int8g32 encoding `[n, bytes]` and their slack `[n]`, as the module says."""
    codec = codec_named("int8g32")
    encoded = codec.encode(np.clip(rows, -_LARGEST, _LARGEST))
    hidden = rows.shape[1]
    true = rows.astype(np.float64)
    sketched = codec.decode(encoded, hidden).astype(np.float64)
    terms = hidden + 8
    gamma = terms * _UNIT / (1.0 - terms * _UNIT)
    slack = _norms(true - sketched) + 2.0 * gamma * (_norms(true) + _norms(sketched))
    return encoded, _rounded_up(slack * (1.0 + terms * 2.0**-52))  # for the rounding of the norms themselves


def _norms(rows: F64) -> F64:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))


def _rounded_up(values: F64) -> F32:
    """The least float32 that is no smaller."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    return np.where(nearest < values, np.nextafter(nearest, np.float32(np.inf)), nearest)


@dataclass(frozen=True)
class PredictorTensor:
    """A tensor for the predictors file. `chunks` gives its bytes once, in pieces that are done with one by one.

    codec: of a matrix any; of a vector f32. shape: `[out, in]`, or `[n]`. Errors: those of `chunks`.
    """

    role: str
    codec: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @staticmethod
    def of(role: str, values: F32, codec: str = "f32") -> PredictorTensor:
        """One whose values are in memory. Raises OverflowError where they do not fit the codec."""
        data = codec_named(codec).encode(values.reshape(-1, values.shape[-1]))
        return PredictorTensor(role, codec, values.shape, lambda: [data.data.cast("B")])


def predictors_size(facts: Facts, tensors: Sequence[PredictorTensor]) -> int:
    """Bytes of the predictors file that holds these tensors."""
    return _plan(facts, tensors).bytes


def write_predictors(
    update: StoreUpdate, tensors: Sequence[PredictorTensor], progress: Progress | None = None
) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Write the predictors file of a store, in the order of use: its entry, and those of its tensors by role.

    The manifest to be committed names them in `predictors` and `tensors`. `update` is mutated: a file is created.
    Chunks are asked for in the order of use, so one tensor's may depend on what another before it computed.

    Raises:
        StoreError, DiskFullError: it cannot be written.
    """
    by_role = {t.role: t for t in tensors}
    plan = _plan(update.store.manifest.facts, tensors)
    meter = Meter(sum(t.bytes for t in plan.entries.values()), progress)
    with update.create("predictors", ".safetensors") as file:
        entries = write_dense(file, plan, lambda role: meter(by_role[role].chunks()))
    return update.entries[-1], entries


def _plan(facts: Facts, tensors: Sequence[PredictorTensor]) -> DensePlan:
    by_role = {t.role: t for t in tensors}
    in_order = [by_role[role] for role in all_roles(facts) if role in by_role]
    assert len(in_order) == len(tensors), "a role no predictor has, or one twice"
    return plan_dense([DenseTensor(t.role, t.codec, t.shape, "") for t in in_order], "predictors")


def sketch_tensors(store: Store) -> list[PredictorTensor]:
    """Sketches of all decision matrices of a store, wherever those lie: weights, slack, and the bias if there is one.

    The store is read when the tensors are written, a block at a time. Their errors are those of `decision_blocks`.
    """
    return [t for layer in range(store.manifest.facts.num_layers) for t in _layer_tensors(store, layer)]


def decision_blocks(store: Store, layer: int) -> Iterator[tuple[F32, F32 | None]]:
    """A layer's decision matrix in the original order of neurons: rows `[some neurons, hidden]` as float32, block by
    block, each with its biases `[some neurons]`, None where the model has none.

    Raises:
        StoreError: the matrix is damaged, or cannot be read.
    """
    codec = codec_named(_decision_codec(store, layer))
    for raw, biases in _raw_blocks(store, layer):
        yield codec.decode(raw, store.manifest.facts.hidden_size), biases


def _decision_codec(store: Store, layer: int) -> str:
    weight = f"{store.manifest.facts.decision}.weight"
    dense = store.manifest.tensors.get(ffn_role(layer, weight))
    return dense.codec if dense else next(p.codec for p in store.manifest.layers[layer].parts if p.role == weight)


def _raw_blocks(store: Store, layer: int) -> Iterator[tuple[Bytes, F32 | None]]:
    """As `decision_blocks`, rows as they are encoded: `[some neurons, bytes]`."""
    facts = store.manifest.facts
    weight, bias = f"{facts.decision}.weight", f"{facts.decision}.bias"
    there: set[str] = {p.role for p in store.manifest.layers[layer].parts}
    there |= {part for part in (weight, bias) if ffn_role(layer, part) in store.manifest.tensors}
    step = max(1, _PIECE // facts.hidden_size)
    with Source(store) as source:
        for block in source.blocks(layer, [part for part in (weight, bias) if part in there]):
            biases = np.ascontiguousarray(block[bias]).view("<f4")[:, 0] if bias in block else None
            for some in (slice(start, start + step) for start in range(0, len(block[weight]), step)):
                yield block[weight][some], None if biases is None else biases[some]


def _layer_tensors(store: Store, layer: int) -> list[PredictorTensor]:
    """The sketch of a layer. One pass over its matrix gives everything: the vectors come later in the file."""
    facts = store.manifest.facts
    neurons, hidden = facts.intermediate_size, facts.hidden_size
    slack, bias = np.zeros(neurons, dtype="<f4"), np.empty(neurons, dtype="<f4")
    own = _decision_codec(store, layer)
    name, codec = sketch_codec(own), codec_named(own)

    def weights() -> Iterator[memoryview]:
        done = 0
        for raw, biases in _raw_blocks(store, layer):
            some = slice(done, done + len(raw))
            if name != own:
                raw, slack[some] = sketch_rows(codec.decode(raw, hidden))
            if biases is not None:
                bias[some] = biases
            done = some.stop
            yield np.ascontiguousarray(raw).data.cast("B")

    found = [
        PredictorTensor(sketch_role(layer, "weight"), name, (neurons, hidden), weights),
        PredictorTensor(sketch_role(layer, "slack"), "f32", (neurons,), lambda: [slack.data.cast("B")]),
    ]
    role = f"{facts.decision}.bias"
    inside = any(p.role == role for p in store.manifest.layers[layer].parts)
    if inside or ffn_role(layer, role) in store.manifest.tensors:
        found.append(PredictorTensor(sketch_role(layer, "bias"), "f32", (neurons,), lambda: [bias.data.cast("B")]))
    return found
