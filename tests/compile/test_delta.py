"""Weight deltas: base + delta, and deltas of something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.errors import CheckpointError
from flashinfer.quant import codec_named
from tests.plain_checkpoint import LLAMA, Tensors, fill, llama_shapes, write_checkpoint

BASE = fill(llama_shapes())
DELTA = {name: np.roll(values, 1, axis=-1) * np.float32(0.37) for name, values in BASE.items()}
"""Not what f16 or bf16 hold exactly, so that rounding shows."""


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    codec = codec_named(dtype)
    return codec.decode(codec.encode(values.reshape(1, -1))).reshape(values.shape)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("delta_dtype", ["f32", "f16"])
def test_the_sum_in_the_type_of_the_base(tmp_path: Path, monkeypatch, dtype: str, delta_dtype: str) -> None:
    monkeypatch.setattr("flashinfer.checkpoint.sum._STRIP", 40)
    base = write_checkpoint(tmp_path / "base", dtypes=dtype)
    delta = write_checkpoint(tmp_path / "delta", tensors=DELTA, dtypes=delta_dtype)
    c = open_checkpoint(base, delta=delta)
    for name, values in BASE.items():
        expected = rounded(values + rounded(DELTA[name], delta_dtype), dtype).reshape(c.tensors[name].matrix)
        rows, cols = expected.shape
        assert c.tensors[name].dtype == dtype

        def decoded(words):
            return codec_named(dtype).decode(np.ascontiguousarray(words).view(np.uint8))

        some = np.array([cols - 1, 0, 2])
        assert (decoded(c.read_rows(name, 0, rows)) == expected).all()
        assert (decoded(c.read_rows(name, rows // 2, rows)) == expected[rows // 2 :]).all()
        assert (decoded(c.read_columns(name, slice(1, cols))) == expected[:, 1:]).all()
        assert (decoded(c.read_columns(name, some)) == expected[:, some]).all()
        c.will_need(name)
    c.close()


def test_the_store_is_that_of_the_target(tmp_path: Path) -> None:
    target = {name: values + DELTA[name] for name, values in BASE.items()}
    pack(write_checkpoint(tmp_path / "target", tensors=target), tmp_path / "expected")
    base, delta = write_checkpoint(tmp_path / "base"), write_checkpoint(tmp_path / "delta", tensors=DELTA)
    pack(base, tmp_path / "store", delta=delta)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == expected


class TestText:
    @pytest.fixture
    def both(self, tmp_path: Path) -> tuple[Path, Path]:
        base = write_checkpoint(tmp_path / "base")
        delta = write_checkpoint(tmp_path / "delta", LLAMA | {"rope_theta": 2e4}, DELTA)
        (base / "tokenizer.json").write_text("base")
        (base / "merges.txt").write_text("base")
        return base, delta

    def test_config_is_the_deltas(self, both) -> None:
        c = open_checkpoint(both[0], delta=both[1])
        assert c.config["rope_theta"] == 2e4
        assert json.loads(c.text["config.json"].read_text()) == c.config
        assert c.text["tokenizer.json"].read_text() == "base"

    def test_a_vocabulary_of_its_own_comes_alone(self, both) -> None:
        (both[1] / "tokenizer.model").write_text("delta")
        c = open_checkpoint(both[0], delta=both[1])
        assert set(c.text) == {"config.json", "generation_config.json", "tokenizer.model"}


class TestOfSomethingElse:
    def refuse(self, tmp_path: Path, tensors: Tensors, message: str, **delta) -> None:
        base = write_checkpoint(tmp_path / "base", dtypes=delta.pop("base", "f32"))
        other = write_checkpoint(tmp_path / "delta", tensors=tensors, **delta)
        with pytest.raises(CheckpointError, match=message) as caught:
            pack(base, tmp_path / "store", delta=other)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "store").exists()

    def test_names(self, tmp_path: Path) -> None:
        less = {n: t for n, t in DELTA.items() if n != "lm_head.weight"}
        self.refuse(tmp_path, less, r"lm_head\.weight is in .*base and not in .*delta: give the base")
        self.refuse(tmp_path, DELTA | {"x": DELTA["lm_head.weight"]}, r"tensor x is in .*delta and not in .*base")

    def test_shapes(self, tmp_path: Path) -> None:
        other = DELTA | {"model.norm.weight": DELTA["model.norm.weight"][:8]}
        self.refuse(tmp_path, other, r"norm\.weight has shape \[8\] in the delta .*, \[16\] in .*: give the base")

    def test_added_vocabulary(self, tmp_path: Path) -> None:
        more = np.concatenate([DELTA["lm_head.weight"], np.zeros((1, 16), np.float32)])
        self.refuse(
            tmp_path, DELTA | {"lm_head.weight": more}, "the base of its 1 added vocabulary rows is not recorded"
        )

    def test_a_sum_that_does_not_fit(self, tmp_path: Path) -> None:
        huge = DELTA | {"lm_head.weight": DELTA["lm_head.weight"] * np.float32(1e6)}
        self.refuse(tmp_path, huge, r"lm_head\.weight of .*base does not fit f16 with what is added", base="f16")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="none does not exist"):
            open_checkpoint(write_checkpoint(tmp_path / "base"), delta=tmp_path / "none")


def test_computed_buffers_may_be_in_one_only(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    delta = write_checkpoint(tmp_path / "delta", tensors=DELTA | buffer)
    pack(write_checkpoint(tmp_path / "base"), tmp_path / "store", delta=delta)
