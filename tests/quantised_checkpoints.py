"""Checkpoints quantised as others do it, written by the letter of their layouts, without the package's reading code.

Each value is rounded to nearest. Beside the quantised checkpoint stands one of the values its codes stand for, which
transformers reads; and what is needed to say what a store must hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from tests.compile.make_quantised import golden

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Tensors = dict[str, npt.NDArray[Any]]
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What is quantised of a llama, and of Mixtral's experts."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Integers:
    """A matrix `[out, in]` as integers: codes; scales and zero-points `[out, groups]`; the group of each column."""

    codes: U8
    scales: npt.NDArray[np.float16]
    zeros: U8
    index: npt.NDArray[np.int32]

    @property
    def values(self) -> F32:
        scales = self.scales.astype(np.float32)[:, self.index]
        return (self.codes.astype(np.float32) - self.zeros[:, self.index]) * scales


@dataclass(frozen=True)
class Floats:
    """A matrix as entries of a table: codes `[out, in]`; scales of every 64 of the flattened values, with what they are
    made of: codes, the largest of every 256 and the offset where they are quantised themselves."""

    codes: U8
    scales: F32
    nested: tuple[U8, F32, np.float32] | None

    @property
    def values(self) -> F32:
        each = np.repeat(self.scales, 64)[: self.codes.size].reshape(self.codes.shape)
        return np.array(NF4, np.float32)[self.codes] * each


def integers(values: F32, group: int, symmetric: bool, ordered: bool = False) -> Integers:
    """Four-bit integers; ordered: columns of a group lie apart, as with act-order."""
    columns = values.shape[1]
    index = (np.arange(columns) // group).astype(np.int32)
    if ordered:
        index = index[np.random.default_rng(0).permutation(columns)]
    codes = np.empty(values.shape, np.uint8)
    scales = np.empty((len(values), index.max() + 1), np.float16)
    zeros = np.full(scales.shape, 8, np.uint8)
    for g in range(scales.shape[1]):
        some = values[:, index == g]
        least, most = np.minimum(some.min(axis=1), 0), np.maximum(some.max(axis=1), 0)
        span = 2 * np.maximum(most, -least) if symmetric else most - least
        scales[:, g] = np.maximum(span / 15, 1e-4)
        scale = scales[:, g].astype(np.float32)
        if not symmetric:
            zeros[:, g] = np.clip(np.rint(-least / scale), 1, 15)  # GPTQ's writers cannot store 0
        codes[:, index == g] = np.clip(np.rint(some / scale[:, None]) + zeros[:, g, None], 0, 15)
    return Integers(codes, scales, zeros, index)


def floats(values: F32, nested: bool) -> Floats:
    """nf4 in blocks of 64."""
    blocks = values.reshape(-1, 64)
    scales = np.maximum(np.abs(blocks).max(axis=1), 1e-8).astype(np.float32)
    second = None
    if nested:
        offset = np.float32(scales.mean())
        over = np.pad(scales - offset, (0, -len(scales) % 256)).reshape(-1, 256)
        largest = np.abs(over).max(axis=1).astype(np.float32)
        at = np.abs(over[..., None] / np.maximum(largest, 1e-30)[:, None, None] - dynamic_map()).argmin(axis=2)
        codes = at.astype(np.uint8).reshape(-1)[: len(scales)]
        scales = dynamic_map()[codes] * np.repeat(largest, 256)[: len(scales)] + offset
        second = (codes, largest, offset)
    table = np.array(NF4, np.float32)
    found = np.abs(blocks[..., None] / scales[:, None, None] - table).argmin(axis=2).astype(np.uint8)
    return Floats(found.reshape(values.shape), scales, second)


def dynamic_map() -> F32:
    """As bitsandbytes stores it."""
    return golden("nf4-nested")[1]["weight.nested_quant_map"]


def words(codes: U8, order: Iterable[int] = range(8)) -> npt.NDArray[np.int32]:
    """`[n, 8 k]` integers of four bits -> `[n, k]` words; `order`: which of eight lies in each half byte."""
    each = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    found = np.zeros(each.shape[:2], np.uint32)
    for place, one in enumerate(order):
        found |= each[:, :, one] << np.uint32(4 * place)
    return found.view(np.int32)


def gptq_parts(q: Integers) -> Tensors:
    return {
        "qweight": np.ascontiguousarray(words(q.codes).T),
        "qzeros": words(np.ascontiguousarray((q.zeros - 1).T)),
        "scales": np.ascontiguousarray(q.scales.T),
        "g_idx": q.index,
    }


def awq_parts(q: Integers) -> Tensors:
    return {
        "qweight": words(np.ascontiguousarray(q.codes.T), AWQ_ORDER),
        "qzeros": words(np.ascontiguousarray(q.zeros.T), AWQ_ORDER),
        "scales": np.ascontiguousarray(q.scales.T),
    }


def bitsandbytes_parts(q: Floats) -> Tensors:
    flat = q.codes.reshape(-1, 2)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(q.codes.shape)}
    parts = {"weight": flat[:, :1] << 4 | flat[:, 1:], "weight.quant_map": np.array(NF4, np.float32)}
    if q.nested is None:
        parts["weight.absmax"] = q.scales
    else:
        parts["weight.absmax"], parts["weight.nested_absmax"], offset = q.nested
        parts["weight.nested_quant_map"] = dynamic_map()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts


@dataclass(frozen=True)
class Scheme:
    """How a whole checkpoint is quantised: what config.json says, and what becomes of a matrix."""

    options: dict[str, Any]
    group: int = 64
    symmetric: bool = False
    ordered: bool = False
    nested: bool = False

    def matrix(self, values: F32) -> tuple[Integers | Floats, Tensors]:
        method = self.options["quant_method"]
        if method == "bitsandbytes":
            made = floats(values, self.nested)
            return made, bitsandbytes_parts(made)
        q = integers(values, self.group, self.symmetric, self.ordered)
        return q, gptq_parts(q) if method == "gptq" else awq_parts(q)


def gptq(group: int, *, symmetric: bool = True, ordered: bool = False) -> Scheme:
    options = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": ordered, "sym": symmetric}
    return Scheme(options, group, symmetric, ordered)


def awq(group: int) -> Scheme:
    options = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(options, group)


def bitsandbytes(*, nested: bool) -> Scheme:
    options = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": nested}
    return Scheme(options, nested=nested)


def quantised(source: Path, target: Path, dequantised: Path, scheme: Scheme) -> dict[str, Integers | Floats]:
    """Write `source`, a llama or a Mixtral in one file, as the scheme has it to `target`, its values in float32 to
    `dequantised`. Returns the quantised matrices by name."""
    tensors, found = load_file(source / "model.safetensors"), {}
    theirs: Tensors = {}
    ours: Tensors = {}
    for name, values in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            found[name], parts = scheme.matrix(values.astype(np.float32))
            theirs |= {f"{module}.{part}": np.ascontiguousarray(t) for part, t in parts.items()}
            ours[name] = found[name].values
        else:
            theirs[name], ours[name] = values, values.astype(np.float32)
    for path, made, more in ((target, theirs, {"quantization_config": scheme.options}), (dequantised, ours, {})):
        shutil.copytree(source, path)
        config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
        (path / "config.json").write_text(json.dumps(config | more))
        save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    return found
