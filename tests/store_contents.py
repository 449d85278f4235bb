"""Reads a whole store by the letter of docs/format.md, with none of the package's reading code: an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def values(data: bytes, codec: str) -> F32:
    """Bytes of a codec as float32."""
    match codec:
        case "f32":
            return np.frombuffer(data, "<f4")
        case "f16":
            return np.frombuffer(data, "<f2").astype(np.float32)
        case "bf16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise AssertionError(codec)


def manifest_of(store: Path) -> dict[str, Any]:
    return json.loads((store / "manifest.json").read_bytes())


def read_back(store: Path) -> dict[str, F32]:
    """Every checkpoint tensor by its name there, as float32 in its own shape, from dense file and bundles."""
    m = manifest_of(store)
    dense = (store / m["dense"]["name"]).read_bytes()
    neurons = (store / m["neurons"]["name"]).read_bytes()
    found = {}
    for t in m["tensors"].values():
        if t["codec"] != "i32":
            data = dense[t["offset"] : t["offset"] + t["bytes"]]
            found[t["source"]] = values(data, t["codec"]).reshape(t["shape"])
    for layer in m["layers"]:
        found |= _layer(m, layer, dense, neurons)
    return found


def _layer(m: dict[str, Any], layer: dict[str, Any], dense: bytes, neurons: bytes) -> dict[str, F32]:
    order = np.arange(layer["neurons"])
    if layer["permutation"] is not None:
        t = m["tensors"][layer["permutation"]]
        order = np.frombuffer(dense[t["offset"] : t["offset"] + t["bytes"]], "<i4")
    found: dict[str, F32] = {}
    for n, part in enumerate(layer["parts"]):
        following = [p["offset"] for p in layer["parts"][n + 1 :]] + [layer["bundle_bytes"]]
        rows = np.empty((layer["neurons"], part["elements"]), np.float32)
        for position, neuron in enumerate(order):
            record, place = divmod(position, layer["bundles_per_record"])
            at = layer["offset"] + record * layer["record_bytes"] + place * layer["bundle_bytes"]
            rows[neuron] = values(neurons[at + part["offset"] : at + following[0]], part["codec"])
        if part["role"] == "down.weight":
            rows = np.ascontiguousarray(rows.T)
        found[part["source"]] = rows[:, 0] if part["elements"] == 1 else rows
    return found


def checkpoint_tensors(checkpoint: Path) -> dict[str, F32]:
    """Every tensor of a checkpoint, by the safetensors library, as float32."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= {name: t.float().numpy() for name, t in load_file(path).items()}
    return found
