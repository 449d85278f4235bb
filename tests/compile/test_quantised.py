"""Checkpoints that others quantised, against what those who define the layouts packed (`make_quantised`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashinfer.checkpoint import Checkpoint, open_checkpoint
from flashinfer.layout.view import View
from flashinfer.pack.views import Views
from flashinfer.quant import codec_named
from tests.compile.make_quantised import CASES, golden, recipe
from tests.quantised_checkpoints import Floats, Integers, awq_parts, bitsandbytes_parts, dynamic_map, gptq_parts

HELD = {
    "gptq": "int4g32", "gptq-asymmetric": "int4g64iz", "gptq-whole-row": "int4g128", "gptq-act-order": None,
    "gptq-8": "int8g32", "gptq-8-asymmetric": None, "awq": "int4g64iz", "nf4": "nf4f32", "nf4-nested": "nf4",
    "nf4-astride": "nf4f32", "nf4-odd": None, "fp4": None,
}  # fmt: skip
"""The codec that holds scales and codes as they are."""
NEAREST = {
    "gptq": "int4g32iz", "gptq-asymmetric": "int4g64iz", "gptq-whole-row": "int4g128iz", "gptq-act-order": "int4g32iz",
    "gptq-8": "int8", "gptq-8-asymmetric": "int8", "awq": "int4g64iz", "nf4": "nf4", "nf4-nested": "nf4",
    "nf4-astride": "nf4", "nf4-odd": "nf4", "fp4": "nf4",
}  # fmt: skip


def write(path: Path, options: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint of one module, `m`."""
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


@pytest.mark.parametrize("case", ["gptq-asymmetric", "gptq-act-order", "awq"])
def test_the_tests_own_writers_pack_integers_as_the_others_do(case):
    options, tensors, values = golden(case)
    codes, scales, zeros, index = recipe(options)
    made = Integers(codes.astype(np.uint8), scales.astype(np.float16), zeros.astype(np.uint8), index)
    assert np.array_equal(made.values, values)
    parts = awq_parts(made) if case == "awq" else gptq_parts(made)
    assert parts.keys() == tensors.keys()
    assert all(np.array_equal(parts[name], tensors[name]) for name in parts)


@pytest.mark.parametrize("case", ["nf4-nested", "nf4-astride"])
def test_and_floats(case):
    _, tensors, values = golden(case)
    halves = tensors["weight"]
    codes = np.concatenate([halves >> 4, halves & 15], axis=1).reshape(values.shape)
    state = json.loads(tensors["weight.quant_state.bitsandbytes__nf4"].tobytes())
    second = (tensors["weight.absmax"], tensors["weight.nested_absmax"], np.float32(state["nested_offset"]))
    largest = np.repeat(second[1], 256)[: len(second[0])]
    made = Floats(codes, dynamic_map()[second[0]] * largest + second[2], second)
    assert np.array_equal(made.values, values)
    parts = bitsandbytes_parts(made)
    assert parts.keys() == tensors.keys()
    assert all(np.array_equal(parts[name], tensors[name]) for name in parts if "state" not in name)


def test_a_layout_cuts_codes_out_as_it_cuts_values(case):
    """Some rows in another order, as of a fused matrix; of a transposed one the codes are of no row."""
    name, source, values = case
    order = np.random.default_rng(0).permutation(len(values))[: len(values) // 2]
    cut = View(("m.weight",), (len(order), values.shape[1]), order)
    turned = View(("m.weight",), values.T.shape, np.arange(values.shape[1]), transposed=True)
    views = Views(source, {"cut": cut, "turned": turned})
    coded = views.tensors["cut"].coded
    assert (coded.codec, views.tensors["turned"].coded.codec) == (HELD[name], None)
    assert np.array_equal(views.read_rows("turned", 2, 9).view("<f4"), values.T[2:9])
    if coded.codec is not None:
        rows = codec_named(coded.codec).decode(coded.rows(1, 12), values.shape[1])
        assert np.array_equal(rows, values[order[1:12]])


def test_a_delta_or_an_adapter_makes_values_of_it(tmp_path):
    """The sum has no codes: it is float32 like that of any other checkpoint."""
    options, tensors, values = golden("gptq")
    write(tmp_path / "base", options, tensors)
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "config.json").write_text("{}")
    save_file({"m.weight": np.full_like(values, 0.5)}, tmp_path / "delta" / "model.safetensors")
    source = open_checkpoint(tmp_path / "base", delta=tmp_path / "delta")
    assert source.tensors["m.weight"].coded is None
    assert np.array_equal(row_values(source, 0, 32), values + np.float32(0.5))
    source.close()


def test_modules_that_were_left_as_they_were(tmp_path):
    options, tensors, _ = golden("awq")
    path = write(tmp_path, options, tensors)
    others = {f"m.{name}": t for name, t in tensors.items()} | {"head.weight": np.ones((2, 3), np.float16)}
    save_file(others, path / "model.safetensors")
    source = open_checkpoint(path)
    assert {*source.tensors} == {"m.weight", "head.weight"}
    assert source.tensors["head.weight"].coded is None
    assert source.read_rows("head.weight", 0, 2).dtype == np.uint16
    source.will_need("m.weight")
    source.close()
