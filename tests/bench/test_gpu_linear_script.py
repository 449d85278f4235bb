"""The benchmark of products of matrices, as far as it goes without a card."""

from __future__ import annotations

import pytest

from tests.backend.on_triton import CARD, larger_programs, runs  # isort: skip  (skips without Triton)

from benchmarks import gpu_linear, on_card

__all__ = ["larger_programs"]


@runs
@pytest.mark.usefixtures("larger_programs")
def test_results_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_linear.main(["--check", "--codecs", "f16", "int4g64"]) == 0
    assert "f16, int4g64: results are right and repeat" in capsys.readouterr().out
    working = gpu_linear.Matrices("f16", 70, 96, 1, "cuda" if CARD else "cpu")
    expected = working.expected(0)
    monkeypatch.setattr(working, "expected", lambda layer: 1.001 * expected)
    with pytest.raises(SystemExit, match=r"fused of f16 70x96 is off by 0\.00"):
        on_card.check(working)


@pytest.mark.skipif(CARD, reason="there is a card")
def test_without_a_card_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="error: there is no CUDA device here"):
        gpu_linear.main(["--shapes", "64x32"])


def test_a_shape_is_rows_and_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_linear.main(["--shapes", "64"])
    assert "invalid shape value: '64'" in capsys.readouterr().err
