"""The tiny models of `gguf_cases` and `gguf_mixtures`: made by transformers, written as llama.cpp's converter does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from gguf import GGMLQuantizationType as Type

from tests.compile.gguf_cases import GPT_METADATA, METADATA, Array, Case
from tests.compile.gguf_files import encode


def make(case: Case, folder: Path) -> Path:
    """The model as transformers saves it; norms and biases are random as well, so that a lost one shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and 0.5))
    model.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | case.says))
    return folder


def write(path: Path, case: Case, folder: Path, kind: Type = Type.F32) -> dict[str, Array]:
    """The model in `folder` as GGUF, matrices as `kind`. Returns what the file's values mean, by the names there."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    known = GPT_METADATA if case.model_type == "gpt2" else METADATA
    for key, said in (known | case.keys).items():
        value = config.get(said) if isinstance(said, str) and said in config else said
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value != said or not isinstance(said, str) or said not in METADATA.values():
            kinds[type(value)](f"{case.architecture}.{key}", value)
    meant: dict[str, Array] = {}
    stacks: dict[str, list[str]] = {}
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in sorted(tensors):
        if ".norms." in name:
            stacks.setdefault(f"{name.split('_layernorm')[0]}_norm.weight", []).append(name)
        elif ".experts." in name and not case.experts_apart:
            stacks.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(name)
        elif "input_linear" in name:
            halves = zip(("gate", "up"), np.split(tensors[name], 2, axis=1), strict=True)
            parts = [_add(writer, case, name.replace("input", part), half, config, kind) for part, half in halves]
            meant[name] = np.concatenate(parts, axis=1)
        else:
            meant[name] = _add(writer, case, name, tensors[name], config, kind)
    for name, names in stacks.items():
        whole = _add(writer, case, name, np.stack([tensors[n] for n in names]), config, kind)
        meant |= dict(zip(names, whole, strict=True))
    for name, factors in case.tensors.items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def logits(folder: Path, tensors: Mapping[str, Array], tokens: list[int]) -> Array:
    """What transformers makes of the model in `folder` with these tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        found: Array = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def _add(writer: Any, case: Case, name: str, values: Array, config: Mapping[str, Any], kind: Type) -> Array:
    """Write one tensor. Returns what its stored values mean."""
    theirs = f"{name}."  # so that every module has its dot
    for module, ours in case.names.items():
        theirs = theirs.replace(f"{module}.", f"{ours}.")
    change = next((c for part, c in case.changes.items() if part in name), lambda values, _: values)
    stored = np.ascontiguousarray(change(values, config))
    if stored.ndim == 1 or "_norm" in name or "gate_inp" in theirs:
        writer.add_tensor(theirs[:-1], stored)
        return values
    data = encode(stored.reshape(-1, stored.shape[-1]), kind).reshape(*stored.shape[:-1], -1)
    writer.add_tensor(theirs[:-1], data, raw_dtype=kind)
    places = change(np.arange(values.size).reshape(values.shape), config)
    back = np.empty(values.size, np.float32)
    back[places.reshape(-1)] = gguf.quants.dequantize(data, kind).reshape(-1)
    return back.reshape(values.shape)
