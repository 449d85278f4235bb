"""PyTorch files against torch itself, and files that would run code or lie."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.checkpoint import open_checkpoint
from flashinfer.checkpoint.torch_file import TorchFile
from flashinfer.checkpoint.torch_pickle import read_state_dict
from flashinfer.errors import CheckpointError
from flashinfer.quant import codec_named
from tests.plain_checkpoint import LLAMA, fill, llama_shapes, write_checkpoint

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def as_torch(root: Path, shards: int = 1) -> Path:
    """The plain checkpoint with its weights in .bin files."""
    write_checkpoint(root)
    (root / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(values) for name, values in fill(llama_shapes()).items()}
    if shards == 1:
        torch.save(tensors, root / "pytorch_model.bin")
        return root
    files = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({n: t for n, t in tensors.items() if files[n] == file}, root / file)
    (root / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return root


def decoded(words: np.ndarray, dtype: str) -> np.ndarray:
    return codec_named(dtype).decode(np.ascontiguousarray(words).view(np.uint8))


class TestReading:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_rows_and_columns(self, tmp_path: Path, dtype: str, protocol: int) -> None:
        values = torch.from_numpy(fill({"m": (7, 5)})["m"]).to(DTYPES[dtype])
        state = OrderedDict(whole=values, transposed=values.T, part=values[2:5], one=values[:1], vector=values[3])
        torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
        file = TorchFile(tmp_path / "x.bin")
        some = np.array([4, 0, 2])
        for name, tensor in state.items():
            expected = tensor.float().numpy().reshape(file.tensors[name].matrix)
            rows, cols = expected.shape
            assert file.tensors[name].shape == tuple(tensor.shape)
            assert (decoded(file.read_rows(name, 0, rows), dtype) == expected).all()
            assert (decoded(file.read_rows(name, rows // 2, rows), dtype) == expected[rows // 2 :]).all()
            assert (decoded(file.read_columns(name, slice(1, cols - 1)), dtype) == expected[:, 1:-1]).all()
            if cols == 5:
                assert (decoded(file.read_columns(name, some), dtype) == expected[:, some]).all()
            file.will_need(name)
        assert (
            decoded(file.read_columns("transposed", some), dtype) == state["transposed"][:, some].float().numpy()
        ).all()
        file.close()

    def test_state_dict_of_a_module(self, tmp_path: Path) -> None:
        """An OrderedDict with `_metadata`, as `state_dict()` gives it; two names share one storage."""
        module = torch.nn.Linear(3, 2)
        state = module.state_dict()
        state["again"] = state["weight"]
        torch.save(state, tmp_path / "x.bin")
        file = TorchFile(tmp_path / "x.bin")
        assert {n: t.shape for n, t in file.tensors.items()} == {"weight": (2, 3), "bias": (2,), "again": (2, 3)}
        assert (file.read_rows("again", 0, 2).view(np.float32) == module.weight.detach().numpy()).all()

    @pytest.mark.parametrize("shards", [1, 3])
    def test_the_store_is_that_of_safetensors(self, tmp_path: Path, shards: int) -> None:
        pack(write_checkpoint(tmp_path / "plain"), tmp_path / "expected")
        pack(as_torch(tmp_path / "torch", shards), tmp_path / "store")
        expected = {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
        assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == expected

    def test_safetensors_come_first(self, tmp_path: Path) -> None:
        root = as_torch(tmp_path / "both")
        write_checkpoint(root)
        (root / "pytorch_model.bin").write_bytes(b"nonsense")
        assert open_checkpoint(root).config == LLAMA

    def test_a_shard_that_is_missing(self, tmp_path: Path) -> None:
        root = as_torch(tmp_path / "torch", 3)
        (root / "pytorch_model-1.bin").unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin is missing, though pytorch_model\.bin\.index"):
            open_checkpoint(root)


class _Payload:
    """Pickles as a call of `os.system`."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._victim}",)


class TestRefused:
    def refuse(self, path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            TorchFile(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600

    def test_code_is_named_and_not_run(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        torch.save({"a": torch.zeros(2), "b": _Payload(victim)}, tmp_path / "evil.bin")
        self.refuse(tmp_path / "evil.bin", r"its pickle names '(posix|nt)\.system', .*it would run code")
        assert not victim.exists()
        pickle.loads(pickle.dumps(_Payload(victim)))
        assert victim.exists()  # so the payload is one

    @pytest.mark.parametrize(
        "name", ["builtins.eval", "torch._utils._rebuild_qtensor", "collections.deque", "torch.load"]
    )
    def test_every_other_name(self, tmp_path: Path, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        with pytest.raises(ValueError, match=f"names '{name}'"):
            read_state_dict(f"c{module}\n{attribute}\n.".encode())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "damaged"),
            (b"}.", "no dict of tensors"),
            (b"K\x01.", "no dict of tensors"),
            (pickle.dumps({"model": {"a": 1}}, 2), "entry 'model' is no tensor"),
            (pickle.dumps({1: 2}, 2), "entry '1' is no tensor"),
            (b"\x80\x02Nr\xff\xff\xff\x7f.", "damaged"),
            (b"ccollections\nOrderedDict\n}b.", "damaged"),
            (b"ctorch\nFloatStorage\nN\x85R.", "damaged"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "description is not sound"),
            (b"NQ.", "description is not sound"),
        ],
    )
    def test_pickles(self, data: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_state_dict(data)

    def test_not_a_zip(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        self.refuse(tmp_path / "old.bin", r"before PyTorch 1\.6; convert it: torch\.save\(torch\.load")
        torch.save({"a": torch.zeros(2)}, tmp_path / "cut.bin")
        data = (tmp_path / "cut.bin").read_bytes()
        (tmp_path / "cut.bin").write_bytes(data[: len(data) // 2])
        self.refuse(tmp_path / "cut.bin", "was cut short")
        (tmp_path / "x.bin").write_bytes(b"nonsense")
        self.refuse(tmp_path / "x.bin", "no PyTorch file")
        self.refuse(tmp_path / "none.bin", "cannot be opened")

    @pytest.mark.parametrize("view", [lambda t: t[:, 1:3], lambda t: t[::2], lambda t: t[:1].expand(4, 6)])
    def test_strides(self, tmp_path: Path, view) -> None:
        torch.save({"a": view(torch.zeros(4, 6))}, tmp_path / "x.bin")
        self.refuse(tmp_path / "x.bin", r"tensor a .* has strides \[.*\.contiguous\(\)")

    def test_other_types_are_no_tensors_to_pack(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "x.bin")
        file = TorchFile(tmp_path / "x.bin")
        assert file.tensors["a"].dtype == "I64"
        with pytest.raises(CheckpointError, match=r"tensor a .* is I64; F32, F16 and BF16 can be packed"):
            file.read_rows("a", 0, 1)


class TestArchives:
    """Each change of a good archive that must be noticed."""

    @pytest.fixture
    def entries(self, tmp_path: Path) -> dict[str, bytes]:
        torch.save({"a": torch.ones(2, 3)}, tmp_path / "good.bin")
        with zipfile.ZipFile(tmp_path / "good.bin") as archive:
            return {info.filename: archive.read(info) for info in archive.infolist()}

    def refuse(self, path: Path, entries: dict[str, bytes], message: str, how: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", how) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        with pytest.raises(CheckpointError, match=message):
            TorchFile(path)

    def test_changes(self, tmp_path: Path, entries: dict[str, bytes]) -> None:
        path, data = tmp_path / "x.bin", "good/data/0"
        self.refuse(path, entries, "is compressed", zipfile.ZIP_DEFLATED)
        self.refuse(path, entries | {data: entries[data][:-1]}, "data of another length")
        self.refuse(path, {k: v for k, v in entries.items() if k != data}, "has no data in the file")
        self.refuse(path, {k: v for k, v in entries.items() if not k.endswith(".pkl")}, r"has no data\.pkl")
        self.refuse(path, entries | {"good/byteorder": b"big"}, "big-endian")
        pickled = entries["good/data.pkl"]
        assert b"K\x02K\x03\x86" in pickled  # the shape
        self.refuse(
            path,
            entries | {"good/data.pkl": pickled.replace(b"K\x02K\x03\x86", b"K\x09K\x03\x86")},
            "beyond its storage",
        )

    def test_offset_of_an_entry(self, tmp_path: Path, entries: dict[str, bytes]) -> None:
        raw = bytearray((tmp_path / "good.bin").read_bytes())
        at = raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 4)
        while b"data/0" not in raw[at : at + 60]:
            at = raw.index(b"PK\1\2", at + 4)
        struct.pack_into("<I", raw, at + 42, 3)  # where the directory says data/0 begins
        (tmp_path / "x.bin").write_bytes(raw)
        with pytest.raises(CheckpointError, match="damaged"):
            TorchFile(tmp_path / "x.bin")

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_any_damage_is_an_error_or_harmless(self, tmp_path: Path, entries: dict[str, bytes], data) -> None:
        raw = bytearray((tmp_path / "good.bin").read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (tmp_path / "bad.bin").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        try:
            file = TorchFile(tmp_path / "bad.bin")
            for name, info in file.tensors.items():
                file.read_rows(name, 0, 1) if len(info.shape) in (1, 2) and 0 not in info.shape else None
        except CheckpointError:
            return
        file.close()
