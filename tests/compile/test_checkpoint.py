from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer.checkpoint import open_checkpoint
from flashinfer.checkpoint.safetensors import SafetensorsFile
from flashinfer.errors import CheckpointError
from flashinfer.quant import codec_named
from tests.plain_checkpoint import LLAMA, fill, llama_shapes, save, save_raw, write_checkpoint


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The plain checkpoint in two shards with an index."""
    root = write_checkpoint(tmp_path / "sharded")
    (root / "model.safetensors").unlink()
    tensors = fill(llama_shapes())
    names = list(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[:7]), ("b.safetensors", names[7:])):
        save(root / shard, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


class TestReading:
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    @pytest.mark.parametrize("chunk", [8, 8 << 20])
    def test_rows_and_columns(self, tmp_path, monkeypatch, dtype, chunk):
        monkeypatch.setattr("flashinfer.checkpoint.raw.COPY_CHUNK", chunk)
        tensors = fill({"m": (7, 5), "v": (6,), "one": (1, 1)})
        save(tmp_path / "x.safetensors", tensors, dtype)
        file = SafetensorsFile(tmp_path / "x.safetensors")

        def decoded(words):
            return codec_named(dtype).decode(np.ascontiguousarray(words).view(np.uint8))

        assert (decoded(file.read_rows("m", 2, 6)) == tensors["m"][2:6]).all()
        assert file.read_rows("m", 3, 3).shape == (0, 5)
        assert (decoded(file.read_columns("m", slice(1, 4))) == tensors["m"][:, 1:4]).all()
        some = np.array([4, 0, 3])
        assert (decoded(file.read_columns("m", some)) == tensors["m"][:, some]).all()
        assert (decoded(file.read_rows("v", 0, 1))[0] == tensors["v"]).all()
        assert (decoded(file.read_columns("v", slice(2, 5)))[0] == tensors["v"][2:5]).all()
        file.will_need("m")
        file.close()
        file.close()

    def test_names_shapes_types(self, plain):
        c = open_checkpoint(plain)
        assert {n: t.shape for n, t in c.tensors.items()} == llama_shapes()
        assert {t.dtype for t in c.tensors.values()} == {"f32"}
        assert c.config["hidden_size"] == 16
        assert set(c.text) == {"config.json", "generation_config.json"}
        c.close()

    def test_shards_are_one_checkpoint(self, plain, sharded):
        one, many = open_checkpoint(plain), open_checkpoint(str(sharded))
        assert one.tensors == many.tensors
        for name, t in one.tensors.items():
            rows = t.matrix[0]
            assert (one.read_rows(name, 0, rows) == many.read_rows(name, 0, rows)).all()

    def test_what_transformers_writes(self, tmp_path):
        from tests.checkpoints import make_opt

        root = make_opt(tmp_path / "opt", dtype="float16", max_shard_size="60KB")
        c = open_checkpoint(root)
        assert len(list(root.glob("*.safetensors"))) > 1
        assert {t.dtype for t in c.tensors.values()} == {"f16"}


class TestPlaces:
    def test_no_such_path(self, tmp_path):
        with pytest.raises(CheckpointError, match="none does not exist; give the directory"):
            open_checkpoint(tmp_path / "none")

    def test_a_hub_name(self):
        with pytest.raises(CheckpointError, match="huggingface-cli download facebook/opt-125m --local-dir DIR"):
            open_checkpoint("facebook/opt-125m")

    @pytest.mark.parametrize(
        ("name", "message"),
        [("model.gguf", r"model\.gguf cannot be read: it is cut short"), ("model.safetensors", "give its directory")],
    )
    def test_a_file(self, tmp_path, name, message):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)

    def test_no_config(self, plain):
        (plain / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            open_checkpoint(plain)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\ud800"])
    def test_bad_config(self, plain, text):
        (plain / "config.json").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(CheckpointError, match=r"config\.json is not"):
            open_checkpoint(plain)

    def test_no_tensors(self, plain):
        (plain / "model.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"has no weights: model\.safetensors or .*one \.gguf file was expected"
        ):
            open_checkpoint(plain)

    def test_other_formats_are_named(self, plain):
        (plain / "model.safetensors").unlink()
        (plain / "tf_model.h5").touch()
        (plain / "flax_model.msgpack").touch()
        with pytest.raises(CheckpointError, match=r"holds TensorFlow and Flax files only, which are not read"):
            open_checkpoint(plain)


class TestShards:
    def test_missing(self, sharded):
        (sharded / "b.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"b\.safetensors is missing, though .*index"):
            open_checkpoint(sharded)

    def test_truncated(self, sharded):
        data = (sharded / "b.safetensors").read_bytes()
        (sharded / "b.safetensors").write_bytes(data[:-1])
        with pytest.raises(CheckpointError, match=r"lm_head\.weight of .*b\.safetensors lies outside .*truncated"):
            open_checkpoint(sharded)

    def test_tensor_not_in_its_shard(self, sharded):
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = "a.safetensors"
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in .*a\.safetensors, where"):
            open_checkpoint(sharded)

    @pytest.mark.parametrize("name", ["../b.safetensors", "/b", "", ".", "..", "x/y"])
    def test_a_shard_elsewhere(self, sharded, name):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(CheckpointError, match="not a plain file name"):
            open_checkpoint(sharded)

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
    def test_bad_index(self, sharded, index):
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="no weight_map"):
            open_checkpoint(sharded)

    def test_empty_index(self, sharded):
        (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        with pytest.raises(CheckpointError, match="holds no tensors"):
            open_checkpoint(sharded)

    def test_a_file_cut_while_open(self, plain):
        c = open_checkpoint(plain)
        (plain / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"ends inside tensor model\.norm\.weight"):
            c.read_rows("model.norm.weight", 0, 1)


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class TestHostileHeaders:
    @pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 7 + b"\x7f", (9).to_bytes(8, "little")])
    def test_length(self, tmp_path, data):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CheckpointError, match="no safetensors file or is truncated"):
            SafetensorsFile(tmp_path / "x")

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (b"{", "header .* is not valid"),
            (b"\xff\xff", "header .* is not valid"),
            (b"[" * 200_000, "header .* is not valid"),
            (b"[]", "not a JSON object"),
            (b'{"a": 1, "a": 2}', "a name occurs twice"),
            ({"a": 1}, "has not exactly the keys"),
            ({"a": {"dtype": "F32"}}, "has not exactly the keys"),
            ({"a": {**entry(), "more": 1}}, "has not exactly the keys"),
            ({"a": entry(dtype="Q4")}, "unknown dtype 'Q4'"),
            ({"a": entry(dtype=7)}, "unknown dtype"),
            ({"a": entry(shape=[-2, -2])}, "no list of counts"),
            ({"a": entry(shape=[2, 2.0])}, "no list of counts"),
            ({"a": entry(shape=[2, True])}, "no list of counts"),
            ({"a": entry(shape=[2**100])}, "no list of counts"),
            ({"a": entry(shape=4)}, "no list of counts"),
            ({"a": entry(shape=[2**60, 2**60, 2**60])}, "where its shape needs"),
            ({"a": entry(offsets=[0])}, "bad data_offsets"),
            ({"a": entry(offsets=[-16, 0])}, "bad data_offsets"),
            ({"a": entry(offsets=[16, 0])}, "lies outside the file"),
            ({"a": entry(offsets=[8, 24])}, "lies outside the file"),
            ({"a": entry(offsets=[0, 2**61])}, "lies outside the file"),
            ({"a": entry(offsets=[0, 12])}, "has 12 bytes where its shape needs 16"),
            ({"a": entry(), "b": entry(shape=[2], offsets=[8, 16])}, "a and b .* overlap"),
        ],
    )
    def test_table(self, tmp_path, table, message):
        save_raw(tmp_path / "x", table, bytes(16))
        with pytest.raises(CheckpointError, match=message) as caught:
            SafetensorsFile(tmp_path / "x")
        assert len(str(caught.value)) < 2000

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_any_damage_is_an_error_or_harmless(self, tmp_path, data):
        save(tmp_path / "good", fill({"a": (2, 3), "b": (5,)}))
        raw = bytearray((tmp_path / "good").read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (tmp_path / "bad").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        try:
            file = SafetensorsFile(tmp_path / "bad")
        except CheckpointError:
            return
        for name, t in file.tensors.items():
            try:
                file.read_rows(name, 0, 1) if len(t.shape) in (1, 2) and 0 not in t.shape else None
            except CheckpointError:
                continue
        file.close()

    def test_metadata_and_other_dtypes_are_no_tensors_to_pack(self, tmp_path):
        table = {"__metadata__": {"format": "pt"}, "a": entry(dtype="I64", shape=[2], offsets=[0, 16])}
        save_raw(tmp_path / "x", table, bytes(16))
        file = SafetensorsFile(tmp_path / "x")
        assert file.tensors["a"].dtype == "I64"
        with pytest.raises(CheckpointError, match=r"tensor a .* is I64; F32, F16 and BF16 can be packed"):
            file.read_rows("a", 0, 1)


def test_llama_config_is_what_the_fixture_says(plain):
    assert open_checkpoint(plain).config == LLAMA
