"""DeepSeek-V3 as it was released, in fp8 with scales of blocks; sessions of latent attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.config import Cap
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError, LayoutError
from flashinfer.store import open_store
from tests.families import make

BLOCK = (16, 24)
OPTIONS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 89, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 89, 5)]
NAME = "model.layers.2.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in fp8, and one of the values its codes stand for."""
    root = tmp_path_factory.mktemp("deepseek")
    plain, released = make("deepseek_v3", root / "plain"), root / "released"
    theirs: dict[str, torch.Tensor] = {}
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj" not in name or not name.endswith(".weight"):
            theirs[name] = ours[name] = tensor
            continue
        scales = torch.rand(*(-(-side // block) for side, block in zip(tensor.shape, BLOCK, strict=True))) / 200 + 1e-3
        spread = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: len(tensor), : tensor.shape[1]]
        codes = (tensor / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        theirs |= {name: codes, f"{name}_scale_inv": scales}
        ours[name] = codes.float() * spread
    save_file(ours, plain / "model.safetensors", {"format": "pt"})
    write(released, plain, theirs)
    return released, plain


def write(path: Path, like: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    path.mkdir()
    said = json.loads((like / "config.json").read_text()) | {"quantization_config": OPTIONS | options}
    (path / "config.json").write_text(json.dumps(said))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_agrees_with_transformers(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Packed in float32, which holds the values."""
    released, plain = made
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0].numpy()
    pack(released, tmp_path / "exact", quant="f32")
    with Model.open(tmp_path / "exact") as model:
        assert np.abs(model.logits(model.session(), PROMPT) - expected).max() <= 1e-4


def test_its_values_are_rounded_to_eight_bits(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The same bytes as those of the values, packed so."""
    pack(made[0], tmp_path / "store")
    pack(made[1], tmp_path / "values", quant="attn=int8,ffn=int8")
    m, of_values = (open_store(tmp_path / name).manifest for name in ("store", "values"))
    assert {role: t.xxh3 for role, t in m.tensors.items()} == {role: t.xxh3 for role, t in of_values.tensors.items()}
    assert [layer.xxh3 for layer in m.layers] == [layer.xxh3 for layer in of_values.layers]
    assert {(o.scheme, o.kept) for o in m.origins.values()} == {("fp8, blocks of 16 x 24", False)}


def test_rows_and_columns(made: tuple[Path, Path]) -> None:
    expected = load_file(made[1] / "model.safetensors")[f"{NAME}.weight"].numpy()
    source = open_checkpoint(made[0])
    info = source.tensors[f"{NAME}.weight"]
    assert (info.shape, info.dtype) == (expected.shape, "f32")
    for rows in ((0, 24), (15, 17), (23, 24)):
        assert np.array_equal(source.read_rows(f"{NAME}.weight", *rows).view("<f4"), expected[slice(*rows)])
    for columns in (slice(20, 30), np.array([39, 2])):
        assert np.array_equal(source.read_columns(f"{NAME}.weight", columns).view("<f4"), expected[:, columns])
    source.close()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.pop(f"{NAME}.weight"), {}, rf"tensor {NAME}.weight of .* is missing"),
        (lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(2, 3)}), {}, r"has scales \[2, 3\]; blocks of"),
        (
            lambda t: t.update({f"{NAME}.weight_scale_inv": torch.full((2, 2), torch.inf)}),
            {},
            "weight_scale_inv .* NaN",
        ),
        (lambda t: t[f"{NAME}.weight"].view(torch.uint8).fill_(127), {}, rf"tensor {NAME}.weight .* holds NaN"),
        (lambda t: None, {"fmt": "e5m2"}, "fmt = e5m2, only e4m3 is read"),
        (lambda t: None, {"weight_block_size": None}, "weight_block_size = None"),
    ],
)
def test_damaged(made: tuple[Path, Path], tmp_path: Path, change: Any, options: Any, message: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(made[0] / "model.safetensors").items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        pack(write(tmp_path / "checkpoint", made[1], tensors, **options), tmp_path / "store")


def test_what_comes_after_the_last_layer_is_left_out(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The released checkpoint has a module there that predicts the token after the next one."""
    tensors = load_file(made[0] / "model.safetensors")
    more = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4), "model.layers.3.mlp.gate.weight": torch.zeros(2, 2)}
    pack(write(tmp_path / "checkpoint", made[1], tensors | more), tmp_path / "store")
    with pytest.raises(LayoutError, match=r"no place for tensor model\.layers\.4\."):
        pack(write(tmp_path / "further", made[1], tensors | {"model.layers.4.x": torch.zeros(2)}), tmp_path / "no")


def test_a_session_comes_back(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Keys are wider than values, and both are kept."""
    pack(made[1], tmp_path / "store")
    with Model.open(tmp_path / "store") as model:
        session = model.session()
        model.step(session, PROMPT)
        kept, window = list(model.save(session)), model.window()
        expected = [model.step(session, [t]) for t in DECODED]
    assert {layer.shape for layer in kept} == {(2, len(PROMPT), 4 * 16)}
    with Model.open(tmp_path / "store", Cap(weight_memory=10**7)) as model:
        session = model.restore(kept, 96, window)
        assert all(np.array_equal(model.step(session, [t]), e) for t, e in zip(DECODED, expected, strict=True))
