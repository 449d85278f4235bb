"""Every invariant a manifest must hold, checked before a byte of the store is used. Pure."""

from __future__ import annotations

import re
from itertools import pairwise

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.errors import StoreError
from flashinfer.quant import LlmInt8, codec_named, codec_with
from flashinfer.store.check_facts import Need, check_facts
from flashinfer.store.geometry import expert_records
from flashinfer.store.manifest import Manifest, NeuronLayer, PartEntry, TensorEntry
from flashinfer.store.roles import (
    RANK_UNIT,
    bundle_parts,
    ffn_role,
    is_outliers,
    is_predictor,
    is_required,
    lowrank_role,
    order_role,
    outliers_role,
    predictor_shapes,
    role_shapes,
    sketch_codec,
    sketch_role,
)

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
RESERVED_NAMES = frozenset({"manifest.json", "manifest.json.tmp", "lock"})
_HASH = re.compile(r"[0-9a-f]{32}")


def check_manifest(m: Manifest, where: str) -> None:
    """Hold every invariant `docs/format.md` states; `where` names the manifest in errors.

    Raises:
        StoreError: names the first one broken.
    """

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise StoreError(f"{where}: {what}; the store is damaged or hand-edited: pack it again")

    a = m.alignment
    need(a >= 512 and a & (a - 1) == 0 and a <= FILE_ALIGNMENT, f"alignment {a} is not a power of two in 512..4096")
    check_facts(m.facts, need)
    need(len(m.layers) == m.facts.num_layers, f"{len(m.layers)} neuron layers, facts say {m.facts.num_layers}")
    _check_files(m, need)
    _check_outliers(m, need)
    _check_tensors(m, need)
    _check_predictors(m, need)
    for i, layer in enumerate(m.layers):
        _check_layer(m, i, layer, need)
        _check_parts(m, i, layer, need)
    _check_disjoint(m, need)
    bundled = {ffn_role(i, p.role) for i, layer in enumerate(m.layers) for p in layer.parts}
    for role in m.origins:
        need(role in m.tensors or role in bundled, f"an origin of {role[:80]!r}, which is not there")


def _check_files(m: Manifest, need: Need) -> None:
    names = [f.name for f in m.files()]
    for f in m.files():
        need(SAFE_NAME.fullmatch(f.name) is not None, f"file name {f.name[:80]!r} leaves the store's directory")
        need(f.name not in RESERVED_NAMES, f"file name {f.name!r} is reserved")
        need(f.bytes >= 0, f"file {f.name} has a negative size")
        need(_HASH.fullmatch(f.xxh3) is not None, f"file {f.name} has no checksum of 32 hex digits")
    need(len(set(names)) == len(names), "two entries name the same file")
    for key in m.text:
        need(SAFE_NAME.fullmatch(key) is not None, f"text name {key[:80]!r} is not a plain file name")
    for f in [m.dense, m.neurons] + ([] if m.predictors is None else [m.predictors]):
        need(f.bytes % FILE_ALIGNMENT == 0, f"{f.name} does not end on a {FILE_ALIGNMENT}-byte boundary")


def _check_tensors(m: Manifest, need: Need) -> None:
    orders = {layer.permutation for layer in m.layers}
    shapes = role_shapes(m.facts) | {
        order_role(i): (m.facts.neurons(i),) for i in range(m.facts.num_layers) if order_role(i) in orders
    }
    bundled = {ffn_role(i, p.role) for i, layer in enumerate(m.layers) for p in layer.parts}
    for role, t in m.tensors.items():
        if is_predictor(role) or is_outliers(role):
            continue
        need(role in shapes, f"unknown role {role[:80]!r}")
        need(t.file == "dense", f"tensor {role} belongs in the dense file")
        need(role not in bundled, f"{role} is both in the dense file and in the bundles")
        need(t.shape == shapes[role], f"tensor {role} has shape {list(t.shape)}, not {list(shapes[role])}")
        _check_tensor(m, role, t, need)
    for role in shapes:
        present = role in m.tensors or role in bundled
        need(present or not is_required(role, m.facts), f"tensor {role} is missing")


def _check_outliers(m: Manifest, need: Need) -> None:
    """Columns for each `llm.int8` matrix, which are of the dense file, and for nothing else."""
    users = {role: outliers_role(role) for role, t in m.tensors.items() if t.codec == LlmInt8.name}
    shapes = role_shapes(m.facts)
    for role, outliers in users.items():
        need(
            outliers is not None and role in shapes,
            f"tensor {role[:80]} cannot have outlier columns, which {LlmInt8.name} is for",
        )
        need(
            outliers in m.tensors, f"tensor {role} is {LlmInt8.name}, and its outlier columns ({outliers}) are missing"
        )
    for role in filter(is_outliers, m.tensors):
        t = m.tensors[role]
        need(role in users.values(), f"tensor {role[:80]} names outlier columns of no matrix")
        width = min(shapes[user][1] for user, outliers in users.items() if outliers == role)
        need(
            len(t.shape) == 1 and 0 < t.shape[0] <= width, f"tensor {role} of shape {list(t.shape)} for {width} columns"
        )
        need(t.file == "dense", f"tensor {role} belongs in the dense file")
        _check_tensor(m, role, t, need)


def _check_predictors(m: Manifest, need: Need) -> None:
    """Low-rank factors come in threes, sketches only with a decision matrix in the bundles."""
    found = {role: t for role, t in m.tensors.items() if is_predictor(role)}
    need((m.predictors is not None) == bool(found), "a predictors file and tensors in it go together")
    need(m.version > 1 or not found, "version 1 has no predictors")
    left = set(found)
    for i in range(m.facts.num_layers):
        rank = _rank(m, i, need)
        for role, shape in predictor_shapes(m.facts, i, rank).items():
            if (t := found.get(role)) is not None:
                need(t.shape == shape, f"tensor {role} has shape {list(t.shape)}, not {list(shape)}")
                need(t.file == "predictors", f"tensor {role} belongs in the predictors file")
                _check_tensor(m, role, t, need)
                left.remove(role)
        _check_sketch(m, i, need)
    need(not left, f"unknown role {min(left, default='')[:80]!r}")


def _rank(m: Manifest, i: int, need: Need) -> int:
    """Rank of a layer's low-rank factors, which are all there or none; 0 where there are none."""
    roles = [lowrank_role(i, part) for part in ("a.weight", "b.weight", "b.bias")]
    there = [role in m.tensors for role in roles]
    need(all(there) or not any(there), f"layer {i} has some of its low-rank factors, not all of them")
    if not all(there):
        return 0
    shape = m.tensors[roles[0]].shape
    rank = shape[0] if shape else 0
    need(rank > 0 and rank % RANK_UNIT == 0, f"tensor {roles[0]} has rank {rank}, not a multiple of {RANK_UNIT}")
    return rank


def _check_sketch(m: Manifest, i: int, need: Need) -> None:
    """A sketch, its slack and the bias it needs, where the decision matrix is in the bundles."""
    weight, slack, bias = (sketch_role(i, part) in m.tensors for part in ("weight", "slack", "bias"))
    need(weight == slack, f"layer {i} has a sketch without its slack, or the other way round")
    need(not weight or m.layers[i].decision == "bundled", f"layer {i} has a sketch of a decision matrix that is dense")
    biased = any(p.role == f"{m.facts.decision}.bias" for p in m.layers[i].parts)
    need(bias == (weight and biased), f"layer {i}: a sketch has a copy of the decision's bias, where that has one")
    if weight:
        codec = m.tensors[sketch_role(i, "weight")].codec
        own = next((p.codec for p in m.layers[i].parts if p.role == f"{m.facts.decision}.weight"), "int8g32")
        need(
            codec in ("int8g32", sketch_codec(own)),
            f"tensor {sketch_role(i, 'weight')} has codec {codec}, {sketch_codec(own)} was expected",
        )


def _check_tensor(m: Manifest, role: str, t: TensorEntry, need: Need) -> None:
    if role.endswith(".ffn.order") or is_outliers(role):
        need(t.codec == "i32", f"tensor {role} has codec {t.codec}, i32 was expected")
        width = 4 * t.shape[0]
    else:
        need(len(t.shape) == 2 or t.codec == "f32", f"vector {role} has codec {t.codec}, f32 was expected")
        columns = m.tensors.get(outliers_role(role) or "") if t.codec == LlmInt8.name else None
        width = codec_with(t.codec, range(0 if columns is None else columns.shape[0])).row_bytes(t.shape[-1])
    expected = width * (t.shape[0] if len(t.shape) == 2 else 1)
    need(t.bytes == expected, f"tensor {role} has {t.bytes} bytes, its shape needs {expected}")
    unit = FILE_ALIGNMENT if len(t.shape) == 2 else 64
    need(t.offset % unit == 0, f"tensor {role} at offset {t.offset} is not aligned to {unit}")
    need(t.offset >= 0 and t.offset + t.bytes <= m.file_of(t).bytes, f"tensor {role} leaves {m.file_of(t).name}")
    need(_HASH.fullmatch(t.xxh3) is not None, f"tensor {role} has no checksum of 32 hex digits")


def _check_layer(m: Manifest, i: int, n: NeuronLayer, need: Need) -> None:
    need(n.neurons == m.facts.neurons(i), f"layer {i} has {n.neurons} neurons, facts say otherwise")
    need(n.bundles_per_record > 0 and n.bundle_bytes > 0, f"layer {i} has empty records")
    need(n.record_bytes > 0 and n.record_bytes % m.alignment == 0, f"layer {i}: record size {n.record_bytes}")
    need(n.record_bytes >= n.bundles_per_record * n.bundle_bytes, f"layer {i}: bundles do not fit their record")
    need(n.records == -(-n.neurons // n.bundles_per_record), f"layer {i}: {n.records} records for its neurons")
    need(n.bytes == n.records * n.record_bytes, f"layer {i}: {n.bytes} bytes for {n.records} records")
    need(n.offset % FILE_ALIGNMENT == 0 and n.offset >= 0, f"layer {i}: offset {n.offset} is not aligned")
    need(n.offset + n.bytes <= m.neurons.bytes, f"layer {i} leaves {m.neurons.name}")
    need(_HASH.fullmatch(n.xxh3) is not None, f"layer {i} has no checksum of 32 hex digits")
    if n.permutation is not None:
        need(n.permutation == order_role(i), f"layer {i}: permutation {n.permutation[:80]!r} is not its own")
    _check_experts(m, i, n, need)


def _check_experts(m: Manifest, i: int, n: NeuronLayer, need: Need) -> None:
    """An expert is a whole number of records, and is known by its number."""
    experts = m.facts.routed(i)
    need((experts is None) == (n.experts is None), f"layer {i} lists experts where facts have none, or none of theirs")
    if experts is None or n.experts is None:
        return
    need(n.decision == "bundled", f"layer {i} of experts has its decision matrix apart")
    need(n.permutation is None, f"layer {i} of experts has a permutation")
    whole = all(size % n.bundles_per_record == 0 for size in (experts.size, experts.shared_size))
    need(whole, f"layer {i}: records of {n.bundles_per_record} neurons cross experts of {experts.size}")
    need(len(n.experts) == experts.columns, f"layer {i} lists {len(n.experts)} experts, facts say {experts.columns}")
    need(n.experts == expert_records(experts, n.bundles_per_record), f"layer {i}: experts do not follow each other")


def _check_parts(m: Manifest, i: int, n: NeuronLayer, need: Need) -> None:
    roles = tuple(p.role for p in n.parts)
    expected = bundle_parts(m.facts, n.decision, {r for r in roles if r.endswith(".bias")})
    need(roles == expected, f"layer {i}: parts {', '.join(roles)}; {', '.join(expected)} were expected")
    end = 0
    for p in n.parts:
        need(p.offset == end, f"layer {i}: part {p.role} is not where the one before ends")
        end += _part_bytes(m, i, p, need)
    need(n.bundle_bytes == end, f"layer {i}: bundle of {n.bundle_bytes} bytes, its parts need {end}")


def _part_bytes(m: Manifest, i: int, p: PartEntry, need: Need) -> int:
    bias = p.role.endswith(".bias")
    elements = 1 if bias else m.facts.hidden_size
    need(p.elements == elements, f"layer {i}: part {p.role} of {p.elements} values, {elements} were expected")
    need(not bias or p.codec == "f32", f"layer {i}: part {p.role} has codec {p.codec}, f32 was expected")
    return codec_named(p.codec).row_bytes(p.elements)


def _check_disjoint(m: Manifest, need: Need) -> None:
    files = {
        file: sorted((t.offset, t.offset + t.bytes, role) for role, t in m.tensors.items() if t.file == file)
        for file in ("dense", "predictors")
    }
    layers = sorted((n.offset, n.offset + n.bytes, f"layer {i}") for i, n in enumerate(m.layers))
    for spans in (*files.values(), layers):
        for (_, end, first), (start, _, second) in pairwise(spans):
            need(end <= start, f"{first} and {second} overlap")
