"""GGUF files of every architecture: the tensors, the facts and the logits of the model they were made from."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.checkpoint import Checkpoint, open_checkpoint
from flashinfer.checkpoint.gguf.architectures import ARCHITECTURES
from flashinfer.checkpoint.gguf.forms import Heads, extents, head_by_head, keys_in_halves, queries_in_halves
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError
from flashinfer.layout import find_layout, match_layout
from flashinfer.quant import codec_named
from tests.compile.gguf_cases import CASES
from tests.compile.gguf_families import logits, make, write
from tests.compile.gguf_mixtures import MIXTURES

ALL = CASES | MIXTURES
KINDS = [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K]
DEQUANTISED = [(name, kind) for name in ("nemotron", "gpt2", "gptneox", "granite") for kind in KINDS]
DEQUANTISED += [(name, kind) for name in MIXTURES for kind in (Type.Q8_0, Type.Q4_0)]
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 40, 12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """`made(case)`: the checkpoint transformers saved, made once."""
    return cache(lambda name: make(ALL[name], tmp_path_factory.mktemp(name)))


def decoded(c: Checkpoint, name: str, words: Any) -> np.ndarray:
    return codec_named(c.tensors[name].dtype).decode(np.ascontiguousarray(words).view(np.uint8))


def facts(c: Checkpoint) -> dict[str, Any]:
    """Every fact, with numbers as float32 has them: GGUF keeps no others."""
    layout = find_layout(c.config, c.tensors)
    found = match_layout(layout, c.config, {n: t.shape for n, t in c.tensors.items()}).facts
    return {k: _single(v) for k, v in msgspec.to_builtins(found).items()}


def _single(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _single(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_single(v) for v in value]
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


@pytest.mark.parametrize("name", ALL)
def test_it_is_the_checkpoint_it_was_made_from(made, tmp_path: Path, name: str) -> None:
    """Names, shapes, facts, and every part of every tensor, bit for bit."""
    expected = write(tmp_path / "x.gguf", ALL[name], made(name))
    theirs, ours = open_checkpoint(made(name)), open_checkpoint(tmp_path / "x.gguf")
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in theirs.tensors.items()}
    assert facts(ours) == facts(theirs)
    for tensor, values in expected.items():
        rows, cols = ours.tensors[tensor].matrix
        table, some = values.reshape(rows, cols), np.array([cols - 1, 0, 3])
        read = decoded(ours, tensor, ours.read_rows(tensor, 0, rows))
        assert np.abs(read - table).max() <= (2**-23 if ALL[name].changes and "norm" in tensor else 0), tensor
        for part, whole in (
            (ours.read_rows(tensor, rows // 3, rows // 2 + 1), read[rows // 3 : rows // 2 + 1]),
            (ours.read_columns(tensor, slice(3, cols - 2)), read[:, 3:-2]),
            (ours.read_columns(tensor, some), read[:, some]),
        ):
            assert (decoded(ours, tensor, part) == whole).all(), tensor
        ours.will_need(tensor)
    ours.close()


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in ALL.values()} == set(ARCHITECTURES)


def test_the_table_in_the_documentation() -> None:
    """Its rows are the architectures, each with its layout, and with what is undone where something is."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    told = {a.replace("`", "").strip(): (layout.split()[0], bool(undone.strip())) for a, layout, undone in lines}
    mixtures = {f"{name} with experts": row.mixture for name, row in ARCHITECTURES.items() if row.mixture is not None}
    assert told == {
        name: (
            find_layout({"architectures": [row.hugging_face]}, ()).family,
            bool(row.forms or row.stacked or row.fused),
        )
        for name, row in (ARCHITECTURES | mixtures).items()
    }


@pytest.mark.parametrize(("name", "kind"), DEQUANTISED)
def test_logits_are_those_of_the_dequantised_weights(made, tmp_path: Path, name: str, kind: Type) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "config.json").write_text((made(name) / "config.json").read_text())
    expected = logits(folder, write(tmp_path / "x.gguf", ALL[name], made(name), kind), TOKENS)
    pack(tmp_path / "x.gguf", tmp_path / "store")
    with Model.open(tmp_path / "store") as model:
        assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.02


def test_q_k_and_v_in_one(made, tmp_path: Path) -> None:
    """Early files of Phi-2 have them so; what is read is the same."""
    (tmp_path / "fused.gguf").write_bytes(fused(made("phi2"), tmp_path))
    ours, theirs = open_checkpoint(tmp_path / "fused.gguf"), open_checkpoint(made("phi2"))
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in theirs.tensors.items()}
    for name, info in theirs.tensors.items():
        assert (ours.read_rows(name, 0, info.matrix[0]) == theirs.read_rows(name, 0, info.matrix[0])).all()
        assert (ours.read_columns(name, slice(1, 9)) == theirs.read_columns(name, slice(1, 9))).all()


def fused(folder: Path, tmp_path: Path) -> bytes:
    """The GGUF file with q, k and v of each layer as one tensor."""
    write(tmp_path / "apart.gguf", CASES["phi2"], folder)
    reader = gguf.GGUFReader(tmp_path / "apart.gguf")
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "phi2")
    for key, value in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, value.contents(), value.types[0])
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    for i, end in ((i, end) for i in range(2) for end in ("weight", "bias")):
        parts = [tensors.pop(f"blk.{i}.attn_{x}.{end}") for x in "qkv"]
        tensors[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(parts)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("qwen2", {"attention.sliding_window": 16}, r"qwen2\.attention\.sliding_window = 16, only 0 is followed"),
        ("qwen2", {"expert_count": 8}, r"qwen2\.expert_count = 8, only 0 is followed"),
        ("mixtral", {"expert_gating_func": 2}, r"llama\.expert_gating_func = 2, only 1 is followed"),
        ("granitemoe", {"expert_weights_norm": False}, r"expert_weights_norm = False, only True is followed"),
        ("granitemoe", {"expert_shared_feed_forward_length": 64}, "shared_feed_forward_length = 64, only 0"),
        ("qwen3moe", {"expert_weights_scale": 2.5}, r"expert_weights_scale = 2\.5, only 1"),
        ("olmoe", {"expert_used_count": 0}, r"expert_used_count = 0, one positive number was expected"),
        ("qwen2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0, only 0"),
        ("phi2", {"rope.dimension_count": 80}, r"rope\.dimension_count = 80, 64 at most"),
        ("phi2", {"rope.dimension_sections": 3}, r"rope\.dimension_sections = 3, which is not followed"),
        ("phi2", {"rope.scaling.type": "longrope"}, r"scaling\.type = longrope, none, linear and yarn are followed"),
        ("gptneox", {"attention.head_count": 3}, r"attn_qkv\.weight has 768 rows, which 3 heads"),
        ("phi3-long", {"rope.dimension_count": 32}, r"rope_factors_long\.weight has 32 values, 16 were expected"),
        ("gpt2", {"block_count": 200}, "200 layers for"),
    ],
)
def test_what_is_not_followed(made, tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    case = dataclasses.replace(ALL[name], keys=ALL[name].keys | keys)
    write(tmp_path / "x.gguf", case, made(name))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", ["olmoe", "qwen2moe", "qwen3moe"])
def test_shares_are_normalised_where_the_file_says_so(made, tmp_path: Path, name: str, said: bool) -> None:
    case = dataclasses.replace(ALL[name], keys=ALL[name].keys | {"expert_weights_norm": said})
    write(tmp_path / "x.gguf", case, made(name))
    assert facts(open_checkpoint(tmp_path / "x.gguf"))["experts"]["normalised"] is said


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_orders_are_permutations(keys: int, group: int, half: int) -> None:
    heads = Heads(keys * group, keys)
    for order, count in (
        (queries_in_halves, heads.queries), (keys_in_halves, keys), (head_by_head, heads.queries + 2 * keys)
    ):  # fmt: skip
        rows = count * 2 * half
        assert sorted(order(rows, heads)) == list(range(rows))


@settings(max_examples=200)
@given(st.lists(st.integers(0, 60), max_size=20))
def test_extents_hold_the_rows_and_little_else(rows: list[int]) -> None:
    pieces = extents(np.array(rows, np.int64))
    inside = [n for start, stop in pieces for n in range(start, stop)]
    assert set(rows) <= set(inside)
    assert inside == sorted(set(inside))
    assert len(inside) <= max(0, 2 * len(set(rows)) - 1)
