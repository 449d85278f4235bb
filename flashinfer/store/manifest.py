"""The manifest: the single commit point of a weight store. `docs/format.md` is its specification."""

from __future__ import annotations

from typing import Literal

import msgspec

from flashinfer.store.facts import Facts, facts_table

FORMAT = "flashinfer-store"
VERSION = 3
MANIFEST_NAME = "manifest.json"
NO_HASH = "0" * 32
"""Stands in a draft for a checksum that is not known yet; of the same length, so that sizes are exact."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen, and an unknown key is an error."""


class FileEntry(_Strict, frozen=True):
    """One immutable file of the store; `xxh3` is the XXH3-128 of its bytes, in hex."""

    name: str
    bytes: int
    xxh3: str


class TensorEntry(_Strict, frozen=True):
    """One tensor of the dense or the predictors file; `offset` counts from the start of that file.

    `source` is the checkpoint's name for it; empty for what no checkpoint has: permutations and predictors.
    """

    codec: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    xxh3: str
    source: str
    file: Literal["dense", "predictors"] = "dense"


class PartEntry(_Strict, frozen=True):
    """One part of a bundle, at `offset` within it: `elements` values of one checkpoint tensor.

    `role` is one of `gate.weight`, `gate.bias`, `up.weight`, `up.bias`, `down.weight`.
    """

    role: Literal["gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight"]
    codec: str
    elements: int
    offset: int
    source: str


class NeuronLayer(_Strict, frozen=True):
    """Where one layer's neurons lie in the neuron file, and what a record of it looks like.

    `permutation` names a dense i32 tensor [neurons]: entry p is the original index of the neuron
    stored at position p; None means the original order. `experts` lists [first record, records]
    per expert of an MoE layer; None for a dense one.
    """

    neurons: int
    decision: Literal["separate", "bundled"]
    parts: tuple[PartEntry, ...]
    bundle_bytes: int
    bundles_per_record: int
    record_bytes: int
    records: int
    offset: int
    bytes: int
    xxh3: str
    permutation: str | None = None
    experts: tuple[tuple[int, int], ...] | None = None


class Origin(_Strict, frozen=True):
    """What a matrix was in a checkpoint that others quantised: `scheme` in words; whether its scales and codes were
    `kept` as they are, or its values rounded to the codec it has here."""

    scheme: str
    kept: bool


class Manifest(_Strict, frozen=True):
    """All that is in a store. Tensor names are roles (`layers.0.attn.q.weight`, `head.weight`, ...).

    `text` maps `tokenizer.json`, `tokenizer.model`, `generation_config.json`, `tokenizer_config.json`,
    ... (the names the checkpoint used) to files. `sections` maps `calibration` to what
    `store.calibration` says; other names are for later additions. `origins` are by role, of matrices that came
    quantised; a manifest without any has no such key.
    """

    format: str
    version: int
    generator: str
    alignment: int
    facts: Facts
    dense: FileEntry
    neurons: FileEntry
    tensors: dict[str, TensorEntry]
    layers: tuple[NeuronLayer, ...]
    text: dict[str, FileEntry]
    sections: dict[str, FileEntry] = {}
    predictors: FileEntry | None = None
    origins: dict[str, Origin] = {}

    def files(self) -> list[FileEntry]:
        """Every file the store needs, the manifest aside."""
        predictors = [] if self.predictors is None else [self.predictors]
        return [self.dense, self.neurons, *predictors, *self.text.values(), *self.sections.values()]

    def file_of(self, tensor: TensorEntry) -> FileEntry:
        """The file a tensor of this manifest lies in."""
        if tensor.file == "dense":
            return self.dense
        assert self.predictors is not None
        return self.predictors

    def weight_bytes(self) -> int:
        """Bytes of all weights of the model: what predictors add and the padding of records excluded."""
        dense = sum(t.bytes for t in self.tensors.values() if t.file == "dense")
        return dense + sum(layer.neurons * layer.bundle_bytes for layer in self.layers)

    def predictor_bytes(self) -> int:
        """Bytes of all that predictors add to the model: factors, sketches, thresholds."""
        return sum(t.bytes for t in self.tensors.values() if t.file == "predictors")


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON: two-space indent, keys in declaration order, a newline at the end."""
    table = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    if not manifest.origins:
        del table["origins"]
    return msgspec.json.format(msgspec.json.encode(table | {"facts": facts_table(manifest.facts)}), indent=2) + b"\n"
