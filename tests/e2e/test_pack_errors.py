"""What `pack` says of a checkpoint it cannot use: one line, and nothing is left of the attempt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flashinfer
from tests.compile.gguf_files import write_gguf
from tests.e2e.program import assert_failed, flashinfer_with, names_in
from tests.plain_checkpoint import LLAMA, Tensors, fill, llama_shapes, save, save_raw, write_checkpoint
from tests.tiny_tokenizers import tiny_json

NAME = "model.layers.1.mlp.up_proj.weight"


def tensors() -> Tensors:
    return fill(llama_shapes())


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def without_tensors(path: Path) -> None:
    (path / "model.safetensors").unlink()


def only_pytorch(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def shard_missing(path: Path) -> None:
    both = tensors()
    half = dict(list(both.items())[:5])
    save(path / "one.safetensors", half)
    shards = {name: "one.safetensors" if name in half else "two.safetensors" for name in both}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (path / "model.safetensors").unlink()


def tensor_missing(path: Path) -> None:
    save(path / "model.safetensors", {n: v for n, v in tensors().items() if n != NAME})


def tensor_extra(path: Path) -> None:
    save(path / "model.safetensors", tensors() | {"model.layers.0.router.weight": np.ones((2, 2), np.float32)})


def tensor_of_nan(path: Path) -> None:
    save(path / "model.safetensors", tensors() | {NAME: np.full(llama_shapes()[NAME], np.nan, np.float32)})


def wrong_shape(path: Path) -> None:
    save(path / "model.safetensors", tensors() | {NAME: np.ones((3, 16), np.float32)})


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def huge_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def header_outside(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**61]}
    save_raw(path / "model.safetensors", {NAME: entry}, bytes(64))


def header_not_json(path: Path) -> None:
    save_raw(path / "model.safetensors", b'{"a": ' * 20000, b"")


def config(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "config.json").write_text(text) and None  # type: ignore[func-returns-value]


AGAIN = "download it again"
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (without_config, ("has no config.json", "give the directory")),
    "no tensors": (without_tensors, ("has no weights", "download them too")),
    "only pytorch": (only_pytorch, ("pytorch_model.bin is no PyTorch file", "download it again")),
    "shard missing": (shard_missing, ("two.safetensors is missing", AGAIN)),
    "tensor missing": (tensor_missing, (NAME, "is missing", AGAIN)),
    "tensor extra": (tensor_extra, ("no place for tensor model.layers.0.router.weight", "docs/layouts.md")),
    "NaN": (tensor_of_nan, (NAME, "NaN", AGAIN)),
    "wrong shape": (wrong_shape, (NAME, "[3, 16]", "[21, 16]", "was expected", "download both again")),
    "unknown architecture": (
        config(json.dumps(LLAMA | {"architectures": ["MambaForCausalLM"]})),
        ("MambaForCausalLM", "known are", "LlamaForCausalLM", "OPTForCausalLM", "docs/layouts.md"),
    ),
    "unknown quantisation": (
        config(json.dumps(LLAMA | {"quantization_config": {"quant_method": "hqq", "bits": 4}})),
        ("is quantised by hqq", "gptq, awq, bitsandbytes", "or the model as it was"),
    ),
    "truncated": (truncated, ("model.safetensors", "truncated", AGAIN)),
    "huge header": (huge_header, ("model.safetensors", str(2**62), AGAIN)),
    "header outside": (header_outside, (NAME, "lies outside the file", AGAIN)),
    "header not JSON": (header_not_json, ("header of", "not valid", AGAIN)),
    "config not JSON": (config("{'single': quotes}"), ("config.json is not valid JSON", AGAIN)),
    "config not an object": (config("[1, 2]"), ("config.json is not a JSON object", AGAIN)),
    "config of nonsense": (
        config(json.dumps(LLAMA | {"hidden_size": "wide"})),
        ("config.json", "hidden_size", "docs/layouts.md"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint(case: str, tmp_path: Path) -> None:
    damage, parts = BROKEN[case]
    checkpoint, target = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out" / "store"
    target.parent.mkdir()
    damage(checkpoint)
    assert_failed(flashinfer_with("pack", checkpoint, target), *parts)
    assert names_in(target.parent) == []


def test_after_the_mistake_is_mended_it_works(tmp_path: Path) -> None:
    checkpoint, target = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out" / "store"
    target.parent.mkdir()
    tensor_of_nan(checkpoint)
    assert_failed(flashinfer_with("pack", checkpoint, target), "NaN")
    write_checkpoint(checkpoint)
    assert flashinfer_with("pack", checkpoint, target).returncode == 0
    assert names_in(target.parent) == ["store"]
    assert flashinfer_with("verify", target).returncode == 0


@pytest.mark.parametrize(
    ("checkpoint", "parts"),
    [
        ("nothing/here/at/all", ("nothing/here/at/all does not exist", "give the directory")),
        ("org/model", ("org/model does not exist", "huggingface-cli download org/model")),
        ("model.gguf", ("model.gguf cannot be read", "cut short")),
    ],
)
def test_what_is_no_checkpoint(checkpoint: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_failed(flashinfer_with("pack", checkpoint, "store", cwd=tmp_path), *parts)
    assert names_in(tmp_path) == ["model.gguf"]


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    """Before hours of packing, not after them. From Python `pack` carries it along, and its user says it."""
    checkpoint, store = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out" / "store"
    store.parent.mkdir()
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"')
    assert_failed(flashinfer_with("pack", checkpoint, store), "tokenizer.json", "damaged")
    assert names_in(store.parent) == []
    flashinfer.pack(checkpoint, store)
    assert_failed(flashinfer_with("generate", store, "-p", "x"), "tokenizer.json", "pack")


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    checkpoint, store = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out" / "store"
    store.parent.mkdir()
    tokens = len(json.loads(tiny_json(checkpoint)["tokenizer.json"].read_text())["model"]["vocab"])
    said = f"{checkpoint}: its tokenizer has {tokens} tokens, its embedding {LLAMA['vocab_size']}: they do not belong"
    assert_failed(flashinfer_with("pack", checkpoint, store), said)
    assert names_in(store.parent) == []


def test_the_tokenizer_in_a_gguf_file_of_another_model(tmp_path: Path) -> None:
    rows, tokens = LLAMA["vocab_size"], [f"<{i}>" for i in range(30)]
    write_gguf(
        tmp_path / "x.gguf", tokenizer__ggml__model="llama", tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=[0.0] * 30, tokenizer__ggml__token_type=[2] + [1] * 29,
    )  # fmt: skip
    said = f"its tokenizer has 30 tokens, its embedding {rows}"
    assert_failed(flashinfer_with("pack", tmp_path / "x.gguf", tmp_path / "store"), "x.gguf", said)
    assert names_in(tmp_path) == ["x.gguf"]


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    assert flashinfer_with("pack", write_checkpoint(tmp_path / "checkpoint"), tmp_path / "store").returncode == 0
    assert_failed(flashinfer_with("generate", tmp_path / "store", "-p", "x"), "has no tokenizer", "pack again")
