"""The benchmark of a token on a card, with the CPU as one."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from flashinfer import pack
from flashinfer.backend import APART
from tests.checkpoints import make_opt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a small store."""
    root = tmp_path_factory.mktemp("gpu")
    pack(make_opt(root / "opt", dtype="float16"), root / "store")
    (root / "ids").write_text(" ".join(map(str, np.random.default_rng(0).integers(3, 80, 16))))
    caps = ["--vram", "20MB", "--weight-memory", "20MB"]
    return [str(root / "store"), "--ids", str(root / "ids"), "--device", APART, "--prompt", "8", *caps]


def test_both_are_run_and_compared(made: list[str], capsys, tmp_path: Path) -> None:
    assert gpu.main([*made, "--rounds", "2", "--out", str(tmp_path / "out.md")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == out
    for text in ("| naive | ", "| ours | ", "Times naive: ", "the CPU, as a device", "fewer by inf"):
        assert text in out


def test_too_few_tokens(made: list[str]) -> None:
    with pytest.raises(SystemExit, match="has 16 tokens, too few for a prompt of 15; give more"):
        gpu.main([*made, "--prompt", "15"])


def test_a_cap_that_is_too_small_is_one_line(made: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: .* below the floor"):
        gpu.main([*made, "--vram", "1kB"])


def took(token: float, logits: Any) -> gpu.Took:
    return gpu.Took(token, 100 / token, 0.0, 0.1, 0.2, 0.9, 1.0, None, None, np.array(logits))


@pytest.mark.parametrize(
    ("naive", "ours", "said"),
    [([1.0, 2], [1.0, 2], None), ([1.0, 2.1], [1.0, 2], "differ by 0.05"), ([1.0, 2], None, "do not repeat")],
)
def test_logits_are_looked_at(monkeypatch: pytest.MonkeyPatch, naive: Any, ours: Any, said: str | None) -> None:
    runs = iter(range(9))

    def decode(store: Path, mode: str, *_: Any) -> tuple[gpu.Took, str]:
        n = next(runs)
        return took(1.0, naive if mode == "naive" else ours or [1.0, 2 + n]), "model"

    monkeypatch.setattr(gpu, "decode", decode)
    a = Namespace(rounds=2, tokens=4, naive_tokens=2)
    if said is None:
        found, _ = gpu.compare(Path(), a, [])
        assert [len(some) for some in found.values()] == [2, 2]
    else:
        with pytest.raises(SystemExit, match=said):
            gpu.compare(Path(), a, [])


def test_ratios_are_taken_round_by_round() -> None:
    found = {"naive": [took(8.0, []), took(2.0, [])], "ours": [took(2.0, []), took(1.0, [])]}
    text = gpu.report(found, ["- somewhere"])
    assert "Times naive: 3 (2-4); flash bytes fewer by 0.375 (0.25-0.5)." in text
    assert "| naive | 5e+03 (2e+03-8e+03) |" in text
