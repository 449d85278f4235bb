"""The twin: the same decoder on weights read straight from a checkpoint. No store, planner, slots, window or layout.

Its map from roles to names is written by hand, so that a wrong layout shows. So is its rule of what a quantised store
has in which codec, and it encodes the checkpoint itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from flashinfer.adapter import Change
from flashinfer.backend import Backend, Buffer, Bundle, Part, open_backend
from flashinfer.choice import Choice
from flashinfer.config import TILE_NEURONS, BackendName, KvType
from flashinfer.model.adapter import Adapter
from flashinfer.model.decoder import Decoder
from flashinfer.model.rows import decode_row, prefill_rows
from flashinfer.model.weights import Ahead, Group, Need, no_guess
from flashinfer.quant import codec_named
from flashinfer.store import Facts, Store
from tests.twin_experts import expert_roles, is_mixture

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
CODECS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

LLAMA_TOP = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
LLAMA_LAYER = {
    "attn.norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "ffn.norm": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
}  # fmt: skip
OPT_TOP = {
    "embed": "model.decoder.embed_tokens", "embed.positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm", "head": "lm_head",
}  # fmt: skip
OPT_LAYER = {
    "attn.norm": "self_attn_layer_norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj", "ffn.norm": "final_layer_norm",
    "ffn.up": "fc1", "ffn.down": "fc2",
}  # fmt: skip


def role_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a llama or opt checkpoint by its role."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    opt = config["model_type"] == "opt"
    top, per_layer = (OPT_TOP, OPT_LAYER) if opt else (LLAMA_TOP, LLAMA_LAYER)
    prefix = "model.decoder.layers" if opt else "model.layers"
    names = dict(top)
    for i in range(config["num_hidden_layers"]):
        names |= {f"layers.{i}.{role}": f"{prefix}.{i}.{name}" for role, name in per_layer.items()}
    roles = {}
    for role, name in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in tensors:
                roles[role if role == "embed.positions" else f"{role}.{kind}"] = tensors[f"{name}.{kind}"]
    if is_mixture(config):
        for i in range(config["num_hidden_layers"]):
            roles |= expert_roles(tensors, i, config)
    return roles


class TwinWeights:
    """See `flashinfer.model.weights.Weights`."""

    looks_ahead = False

    def __init__(
        self, path: Path, facts: Facts, backend: Backend, predictors: Store | None = None, quant: str | None = None
    ) -> None:
        """quant: the codec of all matrices but embedding and head, which are int8 then."""
        self.backend, self._quant = backend, quant
        self._tensors = role_tensors(path)
        self._facts, self._bundled = facts, predictors is not None or facts.experts is not None
        if predictors is not None:
            named = [role for role, t in predictors.manifest.tensors.items() if t.file == "predictors"]
            self._tensors |= {role: torch.from_numpy(predictors.read_tensor(role).copy()) for role in named}
        self._bundles = [self._make_bundles(i) for i in range(facts.num_layers)]

    def vector(self, role: str) -> Buffer | None:
        found = self._tensors.get(role)
        return None if found is None else self.backend.vector(found.float().numpy())

    def has(self, role: str) -> bool:
        return role in self._tensors

    def rows_of(self, role: str) -> int:
        return int(self._tensors[role].shape[0])

    def blocks(self, role: str) -> Iterator[tuple[int, Buffer]]:
        raw, codec = self._coded(role, self._tensors[role])
        yield 0, self.backend.matrix(raw.reshape(-1), codec, *self._tensors[role].shape, keep=False)

    def lookup(self, role: str, ids: Index) -> Floats:
        raw, codec = self._coded(role, self._tensors[role][torch.from_numpy(ids)])
        return codec_named(codec).decode(raw, self._tensors[role].shape[1])

    def _coded(self, role: str, values: torch.Tensor) -> tuple[npt.NDArray[np.uint8], str]:
        """Rows `[n, bytes]` of a matrix of that role, and their codec."""
        own = values.contiguous().view(torch.uint8).numpy()
        if self._quant is None or "lowrank" in role or "sketch" in role or role.endswith("bias"):
            return own, CODECS[values.dtype]
        codec = self._quant if role.startswith("layers.") else "int8"
        return codec_named(codec).encode(values.float().numpy()), codec

    def _make_bundles(self, layer: int) -> tuple[Bundle, npt.NDArray[np.uint8]]:
        """All bundles of a layer in the checkpoint's order, a bundle of zeros behind them."""
        name = f"layers.{layer}.ffn"
        down = self._tensors[f"{name}.down.weight"].t().contiguous()
        columns, parts, at = [], {}, 0
        decision = f"{name}.{self._facts.decision}"
        if self._bundled:
            columns.append(("decision", self._tensors[f"{decision}.weight"]))
        if self._facts.gated:
            columns.append(("up", self._tensors[f"{name}.up.weight"]))
        columns.append(("down", down))
        if self._facts.gated and f"{name}.up.bias" in self._tensors:
            columns.append(("up_bias", self._tensors[f"{name}.up.bias"].float()[:, None]))
        if self._bundled and f"{decision}.bias" in self._tensors:
            columns.append(("decision_bias", self._tensors[f"{decision}.bias"].float()[:, None]))
        raw = []
        for part, values in columns:
            rows, codec = self._coded(f"{name}.{part}", values)
            parts[part] = Part(at, values.shape[1], codec)
            raw.append(rows)
            at += rows.shape[1]
        memory = np.concatenate([np.concatenate(raw, axis=1).reshape(-1), np.zeros(at, dtype=np.uint8)])
        others = (parts.get(name) for name in ("up", "up_bias", "decision", "decision_bias"))
        return Bundle(at, parts["down"], *others, self._facts.up_activation), memory

    def bundle(self, layer: int) -> Bundle:
        return self._bundles[layer][0]

    def neurons(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        (bundle, memory), tiles = self._bundles[layer], need.tiles
        zeros = len(memory) - bundle.bytes
        yield Group(0, len(tiles), memory, tiles, np.where(tiles >= 0, tiles * bundle.bytes, zeros))


class Twin:
    """Prompt in one chunk, then token by token."""

    def __init__(
        self, path: Path, facts: Facts, *, threads: int = 1, context: int = 256,
        kv_type: KvType = "f32", backend: BackendName = "auto", choice: Choice | None = None,
        store: Store | None = None, quant: str | None = None, changes: Iterable[tuple[str, Change]] = (),
    ) -> None:  # fmt: skip
        """choice, store: a predictor, and the store its tensors are taken from. quant: see `TwinWeights`. changes: of
        an adapter."""
        assert TILE_NEURONS > 0
        self.weights = TwinWeights(path, facts, open_backend("cpu", threads, backend), store, quant)
        adapter = Adapter(self.weights.backend, changes)
        self.decoder = Decoder(facts, self.weights, context, window=5, choice=choice, adapter=adapter)
        self.kv = self.decoder.new_kv(context, kv_type)
        self.length = 0

    def logits(self, tokens: list[int]) -> Floats:
        """Append tokens; logits `[len(tokens), vocab]`."""
        ids = np.array(tokens, dtype=np.int64)
        rows = decode_row(self.length) if len(ids) == 1 else prefill_rows(self.length, len(ids))
        x = self.decoder.forward(ids, rows, self.kv)
        self.length = rows.end
        return self.decoder.head(x)[rows.skip : rows.skip + rows.count]
