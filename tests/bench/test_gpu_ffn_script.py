"""The benchmark of the fused feed-forward, as far as it goes without a card."""

from __future__ import annotations

import pytest

from tests.backend.on_triton import CARD, runs  # isort: skip  (skips without Triton)

from benchmarks import gpu_ffn, on_card


@runs
def test_results_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_ffn.main(["--check", "--codecs", "bf16", "int4g64"]) == 0
    assert "bf16, int4g64: results are right and repeat" in capsys.readouterr().out


@runs
def test_a_wrong_result_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    working = gpu_ffn.Working("f16", 1, 70, 96, 40, "cuda" if CARD else "cpu")
    expected = working.expected(0)
    monkeypatch.setattr(working, "expected", lambda layer: 1.001 * expected)
    with pytest.raises(SystemExit, match=r"fused of f16 is off by 0\.00"):
        on_card.check(working)


@pytest.mark.skipif(CARD, reason="there is a card")
def test_without_a_card_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="error: there is no CUDA device here"):
        gpu_ffn.main([])


def test_shares_are_taken_round_by_round() -> None:
    row = on_card.Row("f16", 32, 1_000_000_000, {"fused": [1.0, 2.0, 4.0], "copy": [2.0, 1.0, 4.0], "torch": [8.0] * 3})
    assert row.rates("fused") == [32e9, 16e9, 8e9]
    assert row.shares("copy") == [2, 0.5, 1]
    plain = on_card.Row("nf4", 32, 2, {"fused": [1.0], "copy": [2.0]})
    text = on_card.markdown("Rows", [row, plain], ["- somewhere"]).splitlines()
    assert text[0] == "# Rows"
    assert text[2] == "- somewhere"
    assert text[-2] == ("| f16 | 1,000,000,000 | 16 (8-32) | 16 (8-32) | 100 (50-200) | 4 (4-4) | 4.00 (2.00-8.00) |")
    assert text[-1].endswith("| - | - |")
