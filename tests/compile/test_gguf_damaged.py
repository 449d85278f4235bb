"""GGUF files that lie, are cut short or cannot be followed: one clear line each, and no memory for what they claim."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from flashinfer.checkpoint import open_checkpoint
from flashinfer.errors import CheckpointError
from tests.compile.gguf_files import described, entry, forged, string, write_gguf, write_mixture
from tests.plain_checkpoint import LLAMA, fill, llama_shapes
from tests.shared_data import shared_data

STRING, ARRAY, U32, U64, F32 = 8, 9, 4, 10, 6


def refuse(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


class TestHeader:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "cut short"),
            (b"GGU", "cut short"),
            (b"GGML" + bytes(20), "no GGUF file"),
            (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
            (b"GGUF" + struct.pack("<I", 1) + bytes(16), r"version 1, 2 or 3 was expected"),
            (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"claims {2**60} tensors"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), f"claims 0 tensors, {2**60} entries"),
            (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "claims"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + bytes(12), "claims 0 tensors, 1 entries"),
        ],
    )
    def test_start(self, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "x.gguf").write_bytes(data)
        refuse(tmp_path / "x.gguf", message)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([struct.pack("<Q", 2**62) + bytes(20)], "cut short or damaged, at byte"),
            ([entry("a", 99, bytes(8))], "99 is not a valid GGUFValueType"),
            ([entry("a", U32, number(1)), entry("a", U32, number(1))], "'a' occurs twice"),
            ([entry("a", STRING, struct.pack("<Q", 2**40))], "cut short"),
            ([entry("a", STRING, string("x")[:-1] + b"\xff")], "utf-8"),
            ([entry("a", ARRAY, array(U32, 2**60))], "cut short"),
            ([entry("a", ARRAY, array(STRING, 2**60))], f"array of {2**60} strings"),
            ([entry("a", ARRAY, array(ARRAY, 1, array(U32, 0)))], "array of arrays"),
            ([entry("general.alignment", U32, number(0))], "alignment is 0"),
        ],
    )
    def test_metadata(self, tmp_path: Path, entries: list[bytes], message: str) -> None:
        refuse(forged(tmp_path / "x.gguf", *entries), message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ([described("t", ())], "0 dimensions"),
            ([described("t", (1,) * 9)], "9 dimensions"),
            ([described("t", (2**62, 0))], "'t' is empty"),
            ([described("t", (4,), kind=77)], "77 is not a valid GGMLQuantizationType"),
            ([described("t", (33,), kind=8)], "rows of 33 values, Q8_0 needs multiples of 32"),
            ([described("t", (5,))], "lies outside the file"),
            ([described("t", (4,), offset=2**63)], "lies outside the file"),
            ([described("t", (2**62, 2**62))], "lies outside the file"),
            ([described("t", (2,)), described("t", (2,), offset=8)], "two tensors of one name"),
            ([described("t", (3,)), described("u", (2,), offset=8)], "t and u .* overlap"),
        ],
    )
    def test_tensors(self, tmp_path: Path, tensors: list[bytes], message: str) -> None:
        refuse(forged(tmp_path / "x.gguf", tensors=tuple(tensors), tail=48 if len(tensors) > 1 else 16), message)

    def test_no_memory_for_claims(self, tmp_path: Path) -> None:
        lies = [
            forged(tmp_path / "a.gguf", counts=(2**60, 0)),
            forged(tmp_path / "b.gguf", entry("a", ARRAY, array(U32, 2**40))),
            forged(tmp_path / "c.gguf", entry("a", STRING, struct.pack("<Q", 2**50))),
        ]
        open_checkpoint_imports()
        tracemalloc.start()
        for path in lies:
            refuse(path, "cannot be read")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20

    @pytest.mark.shared
    def test_a_file_copied_as_text(self) -> None:
        refuse(shared_data("gguf/crlf-corrupted-llama-spm.gguf"), r"crlf.* cannot be read: .*download it again")

    def test_a_file_cut_while_open(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "x.gguf")
        c = open_checkpoint(tmp_path / "x.gguf")
        (tmp_path / "x.gguf").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"ends inside tensor"):
            c.read_rows("model.norm.weight", 0, 1)


def open_checkpoint_imports() -> None:
    """Have everything imported that opening a GGUF file imports."""
    import flashinfer.checkpoint.gguf  # noqa: F401


class TestWhatCannotBeFollowed:
    @pytest.mark.parametrize("name", ["mamba", "", "x" * 5000])
    def test_architecture(self, tmp_path: Path, name: str) -> None:
        path = forged(tmp_path / "x.gguf", entry("general.architecture", STRING, string(name)))
        refuse(path, rf"architecture is '{name[:40]}', known are llama, .*: get the model as safetensors")

    def test_no_architecture(self, tmp_path: Path) -> None:
        refuse(forged(tmp_path / "x.gguf"), "architecture is 'None'")

    @pytest.mark.shared
    def test_a_vocabulary_alone(self) -> None:
        refuse(shared_data("gguf/ggml-vocab-llama-spm.gguf"), "no token_embd.weight: it is a vocabulary")

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"split__count": 3}, "one of 3 parts: join them with llama-gguf-split --merge"),
            ({"llama__expert_count": 8}, r"llama\.expert_used_count = None, one positive number was expected"),
            ({"llama__expert_count": [8, 8]}, r"llama\.expert_count = \[8 8\], only 0 is followed"),
            ({"llama__rope__dimension_count": 8}, r"rope\.dimension_count = 8, 4 at most"),
            ({"llama__rope__scaling__type": "sideways"}, r"scaling\.type = sideways, none, linear and yarn"),
            ({"llama__attention__value_length": 8}, r"attention\.value_length = 8, 4 as for keys"),
            ({"llama__block_count": 2**31}, f"says {2**31} layers for"),
            ({"llama__block_count": 0}, r"block_count = 0, one positive number"),
            (
                {"llama__attention__head_count": [4, 2]},
                r"attention\.head_count = \[4 2\], one positive number was expected",
            ),
            ({"llama__attention__head_count_kv": 3}, "8 rows, which 3 heads do not divide into pairs"),
            ({"llama__attention__head_count": 3}, r"16 rows, which 3 heads do not divide into pairs"),
            ({"tokenizer__ggml__model": "bert"}, "no list of tokens"),
            (
                {"tokenizer__ggml__model": "bert", "tokenizer__ggml__tokens": ["a"]},
                "tokenizer is 'bert', llama and gpt2",
            ),
        ],
    )
    def test_metadata(self, tmp_path: Path, metadata: dict[str, object], message: str) -> None:
        write_gguf(tmp_path / "x.gguf", **metadata)
        refuse(tmp_path / "x.gguf", message)

    def test_another_tensor_is_told_by_the_layout(self, tmp_path: Path) -> None:
        from flashinfer import pack

        tensors = fill(llama_shapes()) | fill({"blk.0.attn_q_norm.weight": (4,)})
        write_gguf(tmp_path / "x.gguf", LLAMA, tensors)
        with pytest.raises(CheckpointError, match=r"no place for tensor blk\.0\.attn_q_norm\.weight"):
            pack(tmp_path / "x.gguf", tmp_path / "store")


class TestExperts:
    """Matrices of experts that cannot be."""

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("mixtral", {"up_exps": None}, r"block_sparse_moe\.experts\.0\.w3\.weight \(role .*\) is missing"),
            ("mixtral", {"up_exps": (4, 21, 16)}, r"block_sparse_moe\.experts\.4\.w3\.weight \(role .*\) is missing"),
            ("mixtral", {"up_exps": (6, 21, 16)}, r"no place for tensor blk\.0\.ffn_up\.5\.weight|experts\.5\.w3"),
            ("mixtral", {"up_exps": (5, 16, 21)}, r"experts\.0\.w3\.weight has shape \[16, 21\], \[21, 16\]"),
            ("mixtral", {"up_exps": (105, 16)}, "w3"),
            ("mixtral", {"up_exps": (4097, 1, 1)}, r"blk\.0\.ffn_up_exps\.weight has 4097 experts"),
            ("mixtral", {"up.4": (21, 16)}, r"ffn_up_exps\.weight and blk\.0\.ffn_up\.4\.weight, which are the same"),
            (
                "granitemoe",
                {"up_exps": (4, 21, 16)},
                r"experts of blk\.0\.ffn_gate_exps\.weight and .* differ in number",
            ),
            ("granitemoe", {"up_exps": (5, 24, 16)}, "differ in number, shape or type"),
            ("granitemoe", {"up_exps": None}, "differ in number"),
            ("granitemoe", {"down_exps": None}, r"output_linear\.weight \(role .*\) is missing"),
        ],
    )
    def test_tensors(self, tmp_path: Path, name: str, change: dict[str, tuple[int, ...] | None], message: str) -> None:
        from flashinfer import pack

        architecture = "llama" if name == "mixtral" else name
        write_mixture(tmp_path / "x.gguf", architecture, {f"blk.0.ffn_{k}.weight": v for k, v in change.items()})
        with pytest.raises(CheckpointError, match=message) as caught:
            pack(tmp_path / "x.gguf", tmp_path / "store")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("architecture", ["llama", "granitemoe"])
    def test_unharmed_it_is_read(self, tmp_path: Path, architecture: str) -> None:
        from flashinfer import pack

        write_mixture(tmp_path / "x.gguf", architecture, {})
        pack(tmp_path / "x.gguf", tmp_path / "store")


class TestPlaces:
    def test_several_in_one_directory(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_gguf(tmp_path / f"{name}.gguf")
        refuse(tmp_path, r"holds several GGUF files; name one of them, such as .*a\.gguf")
