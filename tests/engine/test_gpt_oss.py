"""gpt-oss as it was released, its experts in MXFP4: codes kept, logits those of transformers, the same at every cap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.checkpoint import open_checkpoint
from flashinfer.config import BackendName, Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, CheckpointError
from flashinfer.quant import codec_named
from flashinfer.store import open_store
from tests.checkpoints import save
from tests.families import CASES

HIDDEN, NEURONS, EXPERTS = 64, 96, 6
CONFIG: dict[str, Any] = CASES["gpt_oss"].config | {
    "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": 2, "head_dim": 16,
}  # fmt: skip
PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 89, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 89, 5)]
EXPERT = "model.layers.{i}.mlp.experts"
BACKENDS: dict[BackendName, float] = {"torch": 1e-4, **({"native": 1e-2} if has_native() else {})}
"""With how far logits may be from transformers': the native backend rounds activations beside codes."""


@dataclass(frozen=True)
class Made:
    released: Path
    store: Path
    reference: Any


def blocks(rng: np.random.Generator, out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as they are released; values are large enough that gates and ups are cut off."""
    codes = rng.integers(0, 256, (EXPERTS, out, columns // 32, 16), dtype=np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(rng.integers(123, 126, codes.shape[:3]).astype(np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root, rng = tmp_path_factory.mktemp("gpt_oss"), np.random.default_rng(1)
    config = AutoConfig.for_model("gpt_oss", **CONFIG)
    path = save(AutoModelForCausalLM.from_config, config, root / "released", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    tensors = load_file(path / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        for name, out, columns in (("gate_up_proj", 2 * NEURONS, HIDDEN), ("down_proj", HIDDEN, NEURONS)):
            codes, scales = blocks(rng, out, columns)
            del tensors[f"{EXPERT.format(i=i)}.{name}"]
            tensors |= {f"{EXPERT.format(i=i)}.{name}_blocks": codes, f"{EXPERT.format(i=i)}.{name}_scales": scales}
            values = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
            getattr(layer.mlp.experts, name).data = values if name == "gate_up_proj" else rounded(values)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(said))
    pack(path, root / "store")
    return Made(path, root / "store", model)


def rounded(down: torch.Tensor) -> torch.Tensor:
    """A neuron's values share scales here, one output's there."""
    codec, rows = codec_named("mxfp4"), down.reshape(-1, HIDDEN).numpy()
    return torch.from_numpy(codec.decode(codec.encode(rows), HIDDEN)).view(down.shape)


def logits(reference: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_transformers(made: Made, backend: BackendName) -> None:
    expected = logits(made.reference, PROMPT)
    with Model.open(made.store, run=RunConfig(backend=backend)) as model:
        assert np.abs(model.logits(model.session(), PROMPT) - expected).max() <= BACKENDS[backend]


def test_the_limits_are_felt(made: Made) -> None:
    """The comparison above can fail where gates and ups are not cut off."""
    expected = logits(made.reference, PROMPT)
    experts = [layer.mlp.experts for layer in made.reference.model.layers]
    try:
        for each in experts:
            each.limit = 1e9
        assert np.abs(logits(made.reference, PROMPT) - expected).max() > 0.1
    finally:
        for each in experts:
            each.limit = 7.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_at_every_cap(made: Made, backend: BackendName) -> None:
    run = RunConfig(prefill_chunk=9, staging=64 * 1024, ring=32 * 1024, backend=backend)
    with pytest.raises(CapTooSmallError) as refused:
        Model.open(made.store, Cap(weight_memory=1), run=run)
    floor, found = refused.value.floor, []
    for cap in (floor, floor + 60_000, 10**9):
        with Model.open(made.store, Cap(weight_memory=cap), run=run) as model:
            session = model.session()
            found.append([model.logits(session, PROMPT), *(model.step(session, [t]) for t in DECODED)])
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_codes_of_gate_and_up_are_kept(made: Made) -> None:
    m = open_store(made.store).manifest
    codecs = {f"layers.{i}.ffn.{p.role}": p.codec for i, layer in enumerate(m.layers) for p in layer.parts}
    assert {role: origin.kept for role, origin in m.origins.items()} == {
        f"layers.{i}.ffn.{part}.weight": part != "down" for i in range(2) for part in ("gate", "up", "down")
    }
    assert {codecs[role] for role in m.origins} == {"mxfp4"}
    assert {origin.scheme for origin in m.origins.values()} == {"mxfp4, blocks of 32"}
    assert m.tensors["layers.0.ffn.expert_bias.weight"].codec == "bf16"


def test_columns_are_those_of_the_rows(made: Made) -> None:
    source = open_checkpoint(made.released)
    name = f"{EXPERT.format(i=1)}.down_proj.weight"
    assert source.tensors[name].shape == (EXPERTS, HIDDEN, NEURONS)
    rows = source.read_rows(name, 0, EXPERTS * HIDDEN)
    assert np.array_equal(source.read_columns(name, slice(30, 40)), rows[:, 30:40])
    assert np.array_equal(source.read_columns(name, np.array([70, 3])), rows[:, [70, 3]])
    source.close()


def test_a_recipe_rounds_what_it_names(made: Made, tmp_path: Path) -> None:
    pack(made.released, tmp_path / "store", quant="layers.*.ffn.down.weight=int8")
    parts = {p.role: p.codec for p in open_store(tmp_path / "store").manifest.layers[0].parts}
    assert (parts["gate.weight"], parts["down.weight"]) == ("mxfp4", "int8")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_up_proj_scales", lambda t: t[:, 1:], r"has gate_up_proj in blocks \[6, 192, 2, 16\] with scales"),
        ("down_proj_blocks", lambda t: t[..., :15], r"has down_proj in blocks \[6, 64, 3, 15\]"),
        ("down_proj_scales", lambda t: t.fill_(255), r"down_proj_scales of .* holds NaN"),
        ("down_proj_scales", lambda t: t.float(), r"down_proj_scales of .* is f32"),
        ("down_proj_scales", None, r"down_proj_scales of .* is missing"),
    ],
)
def test_damaged(made: Made, tmp_path: Path, name: str, change: Any, message: str) -> None:
    path, full = tmp_path / "checkpoint", f"{EXPERT.format(i=0)}.{name}"
    path.mkdir()
    (path / "config.json").write_text((made.released / "config.json").read_text())
    tensors = load_file(made.released / "model.safetensors")
    found = tensors.pop(full).clone()
    save_file(tensors | ({} if change is None else {full: change(found).contiguous()}), path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        pack(path, tmp_path / "store")
