"""Checkpoints that others quantised, against what those who define the layouts packed (`make_quantised`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.checkpoint import Checkpoint, open_checkpoint
from flashinfer.quant import codec_named
from tests.compile.make_quantised import CASES, golden

HELD = {
    "gptq": "int4g32", "gptq-asymmetric": "int4g64iz", "gptq-whole-row": "int4g128", "gptq-act-order": None,
    "gptq-8": "int8g32", "gptq-8-asymmetric": None, "awq": "int4g64iz", "nf4": "nf4f32", "nf4-nested": "nf4",
    "nf4-astride": "nf4f32", "nf4-odd": None, "fp4": None,
}  # fmt: skip
"""The codec that holds scales and codes as they are."""
NEAREST = {
    "gptq": "int4g32z", "gptq-asymmetric": "int4g64z", "gptq-whole-row": "int4g128z", "gptq-act-order": "int4g32z",
    "gptq-8": "int8", "gptq-8-asymmetric": "int8", "awq": "int4g64z", "nf4": "nf4", "nf4-nested": "nf4",
    "nf4-astride": "nf4", "nf4-odd": "nf4", "fp4": "nf4",
}  # fmt: skip


def write(path: Path, options: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint of one module, `m`."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"quantization_config": options}))
    save_file({f"m.{name}": np.ascontiguousarray(t) for name, t in tensors.items()}, path / "model.safetensors")
    return path


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """The case's name, its checkpoint opened, its values."""
    options, tensors, values = golden(request.param)
    source = open_checkpoint(write(tmp_path, options, tensors))
    yield request.param, source, values
    source.close()


def row_values(source: Checkpoint, start: int, stop: int) -> np.ndarray:
    return source.read_rows("m.weight", start, stop).view("<f4")


def test_a_quantised_matrix_is_a_tensor_of_its_values(case):
    _, source, values = case
    assert [*source.tensors] == ["m.weight"]
    info = source.tensors["m.weight"]
    assert (info.dtype, info.shape) == ("f32", values.shape)
    assert source.config == {}
    assert np.array_equal(row_values(source, 0, len(values)), values)


def test_any_rows_and_any_columns(case):
    _, source, values = case
    rng = np.random.default_rng(0)
    for _ in range(12):
        start, stop = np.sort(rng.choice(len(values) + 1, 2, replace=False))
        assert np.array_equal(row_values(source, start, stop), values[start:stop])
        first, last = np.sort(rng.choice(values.shape[1] + 1, 2, replace=False))
        columns = rng.choice(values.shape[1], 5)
        for some in (slice(int(first), int(last)), columns):
            assert np.array_equal(source.read_columns("m.weight", some).view("<f4"), values[:, some])


def test_codes_are_kept_where_a_codec_holds_them(case):
    name, source, values = case
    coded = source.tensors["m.weight"].coded
    assert (coded.codec, coded.nearest) == (HELD[name], NEAREST[name])
    if coded.codec is None:
        return
    codec = codec_named(coded.codec)
    for start, stop in ((0, len(values)), (3, 4), (7, 21)):
        assert np.array_equal(codec.decode(coded.rows(start, stop), values.shape[1]), values[start:stop])


def test_integers_are_those_of_the_checkpoint():
    """Not only values: the codes of GPTQ, column by column."""
    _, tensors, values = golden("gptq-asymmetric")
    words = tensors["qweight"].view(np.uint32)
    codes = np.stack([words[i // 8] >> 4 * (i % 8) & 15 for i in range(values.shape[1])], axis=1)
    zeros = np.stack([tensors["qzeros"].view(np.uint32)[:, i // 8] >> 4 * (i % 8) & 15 for i in range(len(values))])
    scales = tensors["scales"].T.astype(np.float32)
    expected = (codes.astype(np.float32) - np.repeat(zeros + 1, 64, axis=1)) * np.repeat(scales, 64, axis=1)
    assert np.array_equal(expected, values)


def test_format_v2_stores_zero_points_as_they_are(tmp_path):
    options, tensors, values = golden("gptq-asymmetric")
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    source = open_checkpoint(write(tmp_path, options | {"checkpoint_format": "gptq_v2"}, tensors))
    assert np.array_equal(row_values(source, 0, len(values)), values)
    source.close()


@pytest.mark.parametrize("index", [None, np.zeros(128, np.int32)])
def test_without_g_idx_and_with_one_of_zeros_columns_lie_in_order(tmp_path, index):
    options, tensors, values = golden("gptq")
    del tensors["g_idx"]
    if index is not None:
        tensors["g_idx"] = index
    source = open_checkpoint(write(tmp_path, options, tensors))
    assert np.array_equal(row_values(source, 0, len(values)), values)
    assert source.tensors["m.weight"].coded.codec == "int4g32"
    source.close()


def test_what_it_was_is_said_in_words(case):
    name, source, _ = case
    said = {"gptq-act-order": "gptq 4-bit, groups of 32, act-order", "gptq-whole-row": "gptq 4-bit, one group a row",
            "awq": "awq 4-bit, groups of 64", "nf4": "bitsandbytes nf4, blocks of 128",
            "nf4-nested": "bitsandbytes nf4, blocks of 64, double quantisation"}  # fmt: skip
    assert name not in said or source.tensors["m.weight"].coded.scheme == said[name]
