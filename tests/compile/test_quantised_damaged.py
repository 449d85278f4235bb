"""Quantised checkpoints that cannot be read: one line that says which, what was expected and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.checkpoint import open_checkpoint
from flashinfer.errors import CheckpointError
from tests.compile.make_quantised import golden
from tests.compile.test_quantised import write

Tensors = dict[str, np.ndarray]
STATE = "weight.quant_state.bitsandbytes__nf4"


def refused(path: Path, options: dict[str, Any], tensors: Tensors, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(write(path, options, tensors))
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("case", "changed", "parts"),
    [
        ("gptq", {"quant_method": "aqlm"}, ("aqlm", "read are gptq, awq, bitsandbytes", "or the model as it was")),
        ("gptq", {"quant_method": None}, ("a method it does not name", "read are gptq, awq, bitsandbytes")),
        ("gptq", {"bits": 3}, ("bits = 3", "only 4 or 8 is read")),
        ("gptq", {"bits": "4"}, ("bits = 4", "only 4 or 8 is read")),
        ("gptq", {"checkpoint_format": "marlin"}, ("checkpoint_format = marlin", "gptq or gptq_v2")),
        ("gptq", {"is_marlin_format": True}, ("is_marlin_format = True", "only False")),
        ("gptq", {"group_size": 0}, ("group_size = 0", "a positive number or -1")),
        ("gptq", {"group_size": None}, ("group_size = None", "a positive number or -1")),
        (
            "gptq",
            {"group_size": 64},
            ("m of", "scales [4, 32]", "groups of 64 make it 32 x 128, which needs [2, 32]", "download both again"),
        ),
        ("gptq", {"bits": 8}, ("m of", "8 bits", "download both again")),
        ("awq", {"bits": 8}, ("bits = 8", "only 4 is read")),
        ("awq", {"version": "gemv"}, ("version = gemv", "only gemm")),
        ("awq", {"group_size": 32}, ("scales [2, 32]", "groups of 32 make it 32 x 128, which needs [4, 32]")),
        ("nf4", {"load_in_8bit": True}, ("load_in_8bit = True", "only False")),
        ("nf4", {"quant_method": "awq", "bits": 4, "group_size": 64}, ("quantised by awq", "no such tensors")),
    ],
)
def test_options_that_cannot_be_followed(tmp_path, case, changed, parts):
    options, tensors, _ = golden(case)
    refused(tmp_path, options | changed, tensors, str(tmp_path), *parts)


def test_options_that_are_no_object(tmp_path):
    _, tensors, _ = golden("gptq")
    path = write(tmp_path, {}, tensors)
    (path / "config.json").write_text('{"quantization_config": 4}')
    with pytest.raises(CheckpointError, match="a quantization_config that is no object"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("gptq", "scales"), ("gptq", "qzeros"), ("gptq-act-order", "g_idx"), ("awq", "scales"), ("awq", "qzeros"),
        ("nf4", "weight.absmax"), ("nf4", "weight.quant_map"), ("nf4", "weight"),
        ("nf4-nested", "weight.nested_absmax"), ("nf4-nested", "weight.nested_quant_map"),
    ],
)  # fmt: skip
def test_a_missing_part_is_named(tmp_path, case, part):
    options, tensors, _ = golden(case)
    del tensors[part]
    refused(tmp_path, options, tensors, f"tensor m.{part} of", "is missing", "download it again")


@pytest.mark.parametrize(
    ("case", "part", "parts"),
    [
        ("gptq", "scales", ("scales [3, 32]", "which needs [4, 32]")),
        ("gptq", "qzeros", ("zero-points [3, 4]", "need [4, 4]")),
        ("gptq", "g_idx", ("g_idx of 127 inputs", "qweight has 128")),
        ("gptq", "qweight", ("m of", "download both again")),
        ("awq", "qzeros", ("zero-points [1, 4]", "need [2, 4]")),
        ("awq", "qweight", ("scales [2, 32]",)),
        ("nf4", "weight", ("weight of shape [2047, 1]", "needs [2048, 1]")),
        ("nf4", "weight.absmax", ("weight.absmax of shape [31]", "needs [32]")),
        ("nf4-astride", "weight.nested_absmax", ("weight.nested_absmax of shape [1]", "needs [2]")),
    ],
)
def test_a_part_that_is_too_short(tmp_path, case, part, parts):
    options, tensors, _ = golden(case)
    tensors[part] = tensors[part][:-1]
    if case == "awq" and part == "qweight":
        tensors[part] = tensors[part][:-64]
    refused(tmp_path, options, tensors, *parts)


@pytest.mark.parametrize(
    ("case", "part"), [("gptq", "qweight"), ("gptq", "scales"), ("awq", "qzeros"), ("nf4", "weight.absmax")]
)
def test_a_part_of_another_type(tmp_path, case, part):
    options, tensors, _ = golden(case)
    tensors[part] = tensors[part].astype(np.float64)
    refused(tmp_path, options, tensors, f"tensor m.{part} of", "F64", "was expected")


def test_a_group_that_is_not_there(tmp_path):
    options, tensors, _ = golden("gptq-act-order")
    for wrong in (4, -1):
        tensors["g_idx"][7] = wrong
        refused(tmp_path / str(wrong), options, tensors, "groups in g_idx", "groups of 32 do not have")


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"quant_type": "nf4", "blocksize": "64", "shape": [1, 2]}'])
def test_a_state_that_cannot_be_read(tmp_path, text):
    options, tensors, _ = golden("nf4")
    tensors[STATE] = np.frombuffer(text.encode(), np.uint8)
    refused(tmp_path, options, tensors, "m of", "a quant_state that cannot be read")


@pytest.mark.parametrize("changed", [{"blocksize": 0}, {"shape": [0, 64]}, {"blocksize": 64}, {"shape": [32, 256]}])
def test_a_state_that_lies(tmp_path, changed):
    options, tensors, _ = golden("nf4")
    state = json.loads(tensors[STATE].tobytes()) | changed
    tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    refused(tmp_path, options, tensors, "m of", "download both again")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_named_when_they_are_read(tmp_path, value):
    options, tensors, _ = golden("gptq")
    tensors["scales"][1, 5] = value
    source = open_checkpoint(write(tmp_path, options, tensors))
    for read in (source.tensors["m.weight"].coded.rows, lambda a, b: source.read_rows("m.weight", a, b)):
        with pytest.raises(
            CheckpointError, match=r"tensor m\.scales of .* holds NaN or infinity; .* download it again"
        ):
            read(0, 32)
    source.close()


def test_a_matrix_that_is_there_twice(tmp_path):
    options, tensors, values = golden("gptq")
    refused(tmp_path, options, tensors | {"weight": values}, "has m.weight twice")


def test_a_file_that_was_cut_short(tmp_path):
    options, tensors, _ = golden("awq")
    path = write(tmp_path, options, tensors)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"tensor m\.\w+ of .* lies outside the file .* truncated"):
        open_checkpoint(path)
