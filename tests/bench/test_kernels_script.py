"""`benchmarks/kernels.py` on a small working set: both sides go through the bytes they say they do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flashinfer.backend import has_native

if not has_native():
    pytest.skip("the native core is not built", allow_module_level=True)

from benchmarks import kernels
from flashinfer.backend.native_backend import NativeBackend
from flashinfer.quant import codec_named
from flashinfer.units import MIB


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DENSE", (256, 64))
    monkeypatch.setattr(kernels, "SPARSE", {"gated": (1280, 64, True), "plain": (1280, 64, False)})
    monkeypatch.setattr(kernels, "LEAST", 64 * 1024)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_scan_reads_every_byte_in_turn(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.arange(1024, dtype=np.uint64)
    seen: list[int] = []
    monkeypatch.setattr(
        kernels.np, "bitwise_or", type("Noting", (), {"reduce": lambda part: seen.extend(part.tolist())})
    )
    with ThreadPoolExecutor(1) as pool:
        scan = kernels.scanner(memory.view(np.uint8), pool, threads)
        scan(600 * 8)
        assert seen == list(range(600))
        scan(600 * 8)
        assert seen[600:] == [*range(600, 1024), *range(176)]


@pytest.mark.parametrize("codec", kernels.CODECS)
def test_products_are_of_the_codecs_rows(codec: str) -> None:
    memory = np.zeros(MIB, dtype=np.uint8)
    kernels.fill(memory, codec, 64)
    row = codec_named(codec).row_bytes(64)
    values = codec_named(codec).decode(memory[: 100 * row].reshape(100, row), 64)
    assert 0.9 < values.std() < 1.1
    backend = NativeBackend(1)
    size = kernels.dense(backend, memory, codec)()
    assert size % (256 * row) == 0 < size
    backend.close()


def test_the_active_neurons_are_distinct_and_stay_in_their_layer() -> None:
    places = list(kernels._places(range(3), 1280, 256, 1))
    assert len(places) == 30
    for i, some in enumerate(places):
        layer, within = np.divmod(some.reshape(-1) // 256, 1280)
        assert (layer == i % 3).all()
        assert len(set(within.tolist())) == 64
    assert (places[0] != places[3]).any()


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.md"
    assert kernels.main(["--threads", "1", "--bytes", "1MiB", "--rounds", "2", "--out", str(out)]) == 0
    text = out.read_text()
    assert capsys.readouterr().out == text
    rows = [line for line in text.splitlines() if line.startswith(("| dense", "| sparse"))]
    assert len(rows) == 3 * len(kernels.CODECS)
