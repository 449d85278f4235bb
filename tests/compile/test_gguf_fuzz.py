"""Whatever a GGUF file says or has lost, what comes out of it is a model or one clear line."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer.checkpoint import open_checkpoint
from flashinfer.errors import CheckpointError, StoreError
from flashinfer.layout import find_layout, match_layout
from flashinfer.text import check_files
from tests.compile.gguf_files import METADATA, described, entry, forged, gguf_name, string, write_mixture
from tests.compile.test_gguf_tokenizer import BPE, SPM
from tests.plain_checkpoint import LLAMA, fill, llama_shapes

SAID: dict[str, Any] = {
    "general.architecture": "llama", "general.alignment": 32, **{f"llama.{k}": LLAMA[v] for k, v in METADATA.items()},
    "llama.rope.dimension_count": 4,
}  # fmt: skip
MORE = [
    "split.count", "tokenizer.chat_template", *(f"tokenizer.ggml.{key}" for key in (
        "merges", "pre", "unknown_token_id", "eot_token_id", "add_bos_token", "add_space_prefix")),
    *(f"llama.{key}" for key in (
        "expert_count", "expert_used_count", "expert_gating_func", "attention.key_length", "attention.value_length",
        "attention.sliding_window",
        "attention.causal", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast")),
]  # fmt: skip
KEYS = sorted({*SAID, *SPM, *BPE, *MORE})
ODD = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, -1, 2**31, 2**32 - 1, 2**63, 0.5, 1.5, -2.0, float("nan"), float("inf")]),
    st.sampled_from(["", "none", "yarn", "linear", "llama", "gpt2", "x" * 300, "{{ x }}", True, False]),
    st.lists(st.integers(-2, 9), max_size=3), st.lists(st.sampled_from("ab"), max_size=11),
    st.lists(st.booleans(), max_size=2), st.lists(st.floats(width=32), max_size=2),
)  # fmt: skip
FOLDER = [HealthCheck.function_scoped_fixture]


def typed(value: Any) -> tuple[int, bytes]:
    """GGUF's type of a value, and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        kind, code = (5, "<i") if value < 0 else (4, "<I") if value < 2**32 else (10, "<Q")
        return kind, struct.pack(code, value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, string(value)
    values = [typed(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    kind = values[0][0] if values else 4
    return 9, struct.pack("<IQ", kind, len(values)) + b"".join(data for _, data in values)


@cache
def body() -> tuple[tuple[bytes, ...], bytes]:
    """Descriptions and data of a llama's tensors."""
    descriptions, data = [], b""
    for name, values in fill(llama_shapes()).items():
        descriptions.append(described(gguf_name(name), values.shape[::-1], 0, len(data)))
        data += values.tobytes() + bytes(-values.nbytes % 32)
    return tuple(descriptions), data


def write(path: Path, said: dict[str, Any]) -> bytes:
    """A whole file of that metadata. Returns its bytes."""
    tensors, data = body()
    header = forged(path, *(entry(key, *typed(value)) for key, value in said.items()), tensors=tensors).read_bytes()
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path.read_bytes()


def use(path: Path) -> None:
    """Open the file, match it with its layout, read of every tensor, load its tokenizer."""
    c = open_checkpoint(path)
    try:
        shapes = {name: info.shape for name, info in c.tensors.items()}
        facts = match_layout(find_layout(c.config, c.tensors), c.config, shapes).facts
        for name in c.tensors:
            assert c.read_rows(name, 0, 1).size
            assert c.read_columns(name, slice(0, 2)).size
        check_files(c.text, facts.vocab_size, path)
    finally:
        c.close()


def use_or_refuse(path: Path) -> None:
    """As `use`, or one of our errors, of one line."""
    said = ""
    try:
        use(path)
    except (CheckpointError, StoreError) as e:
        said = str(e)
    assert "\n" not in said
    assert len(said) < 900


@pytest.mark.parametrize("tokenizer", [{}, SPM, BPE])
def test_unharmed_it_is_read(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    write(tmp_path / "x.gguf", SAID | tokenizer)
    use(tmp_path / "x.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=FOLDER)
@given(
    tokenizer=st.sampled_from([SPM, BPE]), lost=st.lists(st.sampled_from(KEYS), max_size=1),
    odd=st.dictionaries(st.sampled_from(KEYS), ODD, max_size=3),
)  # fmt: skip
def test_any_metadata(tmp_path: Path, tokenizer: dict[str, Any], lost: list[str], odd: dict[str, Any]) -> None:
    said = {key: value for key, value in (SAID | tokenizer | odd).items() if key not in lost}
    write(tmp_path / "x.gguf", said)
    use_or_refuse(tmp_path / "x.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=FOLDER)
@given(tokenizer=st.sampled_from([SPM, BPE]), data=st.data())
def test_any_bytes(tmp_path: Path, tokenizer: dict[str, Any], data: st.DataObject) -> None:
    """Of the header, where nearly all of a small file's meaning is."""
    raw = bytearray(write(tmp_path / "x.gguf", SAID | tokenizer))
    for at in data.draw(st.lists(st.integers(0, len(raw) - len(body()[1]) - 1), min_size=1, max_size=3)):
        raw[at] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(raw)
    use_or_refuse(tmp_path / "x.gguf")


@settings(max_examples=100, deadline=None, suppress_health_check=FOLDER)
@given(architecture=st.sampled_from(["llama", "granitemoe"]), data=st.data())
def test_any_bytes_of_a_mixture(tmp_path: Path, architecture: str, data: st.DataObject) -> None:
    """Shapes and names of the tensors that hold all experts among them."""
    write_mixture(tmp_path / "x.gguf", architecture, {})
    use(tmp_path / "x.gguf")
    raw = bytearray((tmp_path / "x.gguf").read_bytes())
    first = raw.index(np.full(8, 0.01, np.float32).tobytes())
    for at in data.draw(st.lists(st.integers(0, first - 1), min_size=1, max_size=3)):
        raw[at] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(raw)
    use_or_refuse(tmp_path / "x.gguf")


def test_cut_short_anywhere(tmp_path: Path) -> None:
    raw = write(tmp_path / "x.gguf", SAID | SPM)
    for length in range(0, len(raw) - 32, 61):
        (tmp_path / "x.gguf").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cut short|claims"):
            open_checkpoint(tmp_path / "x.gguf")
