"""From runs to figures, and from figures to the report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.bench.compare.contenders import LADDER, Contender
from flashinfer.bench.compare.contest import Run, harmonic_mean
from flashinfer.bench.compare.disk import at_rate, roofline
from flashinfer.bench.compare.figures import summarize
from flashinfer.bench.compare.markdown import markdown
from flashinfer.bench.compare.plot import draw
from flashinfer.bench.compare.quality import largest_difference, perplexity, same_greedy
from flashinfer.bench.compare.task import Task, Wanted, repeated
from flashinfer.config import DiskCurve
from flashinfer.units import MIB

RUNGS = {rung.name: rung for rung in LADDER}
NAIVE = Contender("naive", "all", "ours", Path("s"), "python", RUNGS["naive"], "all")
WINDOW = Contender("window", "+ window", "ours", Path("s"), "python", RUNGS["window"], "low-rank")
LLAMA = Contender("llama.cpp", "mapped", "run_llama", Path("m.gguf"), "python")
IN_RAM = replace(LLAMA, name="llama.cpp-ram", capped=False)
RATES = {"torch": 10e9}
SCRIPT = [1, 0]
LOGITS = np.array([[0, math.log(3), 0], [math.log(2), 0, 0], [0, 0, 9]], dtype=np.float32)


def predicted(size: float, seconds: float) -> dict[str, Any]:
    return {"bytes": size, "seconds": seconds, "dram_bytes": 5e9, "bound": "disk"}


def ended(size: float, seconds: float) -> dict[str, Any]:
    said = predicted(size, seconds)
    return {"asked": {"bytes": 1e9, "reads": 100}, "weights": 4e8, "predicted": {"probed": said, "cached": said}}


def run(who: str, cap: int | None, tokens: list[float], logits: np.ndarray | None = LOGITS, **more: Any) -> Run:
    done = Run(
        who, cap, "ok", 900_000_000, None, 0.5, 1.0, 2.0, tokens, [10**9] * len(tokens), [2e9], 9.0, {}, "", logits
    )
    return replace(done, **more)


RUNS = [
    run("naive", 10**9, [3.0, 5.0], end=ended(1.1e9, 2.0)),
    run("window", 10**9, [0.4, 0.5], LOGITS + np.float32(0.25), end=ended(1.1e9, 2.0)),
    run("llama.cpp", 10**9, [2.0, 2.0], LOGITS[:, ::-1].copy()),
    run("llama.cpp-ram", None, [0.1, 0.2], None),
]
WHO = [NAIVE, WINDOW, LLAMA, IN_RAM]


def test_perplexity_is_that_of_the_forced_tokens() -> None:
    """p(1) = 3/5 after the prompt, p(0) = 2/4 after the first token; what follows the last is not looked at."""
    assert perplexity(LOGITS, SCRIPT) == pytest.approx((0.6 * 0.5) ** -0.5)
    assert perplexity(LOGITS + 100, SCRIPT) == pytest.approx(perplexity(LOGITS, SCRIPT), rel=1e-5)
    assert perplexity(np.zeros((4, 7), np.float32), [0, 3, 6]) == pytest.approx(7)


def test_differences_of_logits() -> None:
    assert largest_difference(LOGITS, LOGITS) == 0
    assert largest_difference(LOGITS + np.float32([0, -2, 1]), LOGITS) == 2
    assert same_greedy(LOGITS[:, ::-1], LOGITS) == 1


def test_roofline_is_bytes_over_rates_over_time() -> None:
    assert roofline(2e9, 1e9, 5e9, 10e9, 5.0) == pytest.approx((2 + 0.5) / 5)
    assert roofline(0, 1e9, 5e9, 10e9, 0.5) == pytest.approx(1)


def test_rates_of_probes() -> None:
    assert harmonic_mean([1e9, 3e9]) == pytest.approx(1.5e9)
    curve = at_rate(DiskCurve(), 1.3e9, MIB)
    assert MIB / curve.seconds(1, MIB, 8) == pytest.approx(1.3e9)


def test_rows() -> None:
    tables = summarize(RUNS, WHO, SCRIPT, RATES)
    naive, window, llama, ram = tables["rows"]
    assert (naive["s_per_token"], naive["s_per_token_range"], naive["tokens"]) == (4.0, [3.0, 5.0], 2)
    assert (window["to_llama"], window["to_naive"]) == pytest.approx((2 / 0.45, 4 / 0.45))
    assert (llama["to_llama"], ram["to_llama"], ram["to_ram"], llama["to_ram"]) == pytest.approx((1, None, 1, 0.075))
    assert naive["roofline"] == pytest.approx((0.5 + 0.5) / 4)
    assert (llama["roofline"], llama["asked_per_token"]) == (None, None)
    assert naive["perplexity"] == window["perplexity"] == pytest.approx((0.6 * 0.5) ** -0.5)
    assert ram["perplexity"] is None
    [prediction] = tables["predictions"]  # the planner knows nothing of reads part by part
    assert (prediction["contender"], prediction["bytes_error"]) == ("naive", [pytest.approx(0.1)])
    assert prediction["s_probed_error"] == [-0.5]
    assert [(r["contender"], r["largest_difference"], r["identical"]) for r in tables["logits"]] == [
        ("naive", 0, True), ("window", 0.25, False), ("llama.cpp", 9, False),
    ]  # fmt: skip


def test_who_is_not_comparable_has_no_figures_of_quality() -> None:
    tables = summarize(RUNS, [NAIVE, WINDOW, replace(LLAMA, comparable=False)], SCRIPT, RATES)
    assert tables["rows"][2]["perplexity"] is None
    assert [r["contender"] for r in tables["logits"]] == ["naive", "window"]


def test_without_an_exact_run_there_is_nothing_to_hold_logits_against() -> None:
    assert summarize(RUNS[1:3], [WINDOW, LLAMA], SCRIPT, RATES)["logits"] == []


def listed(*contenders: Contender) -> list[dict[str, str]]:
    return [{"name": c.name, "what": c.what, "on": c.model.name} for c in contenders]


GOLDEN = """\
# Under the same caps

- a machine

**Incomplete: interrupted before all rounds were done.**

a note  

|  | what runs | on |
| --- | --- | --- |
| naive | all | s |
| loop | plain | hf |

Left out:

- airllm: give --checkpoint

| cap, GB |  | s/token (range) | times faster than llama.cpp | than naive | than llama.cpp in RAM | \
GB read/token (kernel) | asked | reads | first token, s | peak memory, GB | perplexity | \
roofline | probe before, GB/s | ended |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | naive | - | - | - | - | - | - | - | - | 0.000 | - | - | 2.00 | refused (floor 1.234 GB) |
| 1 | loop | 3.00 (2.00-5.00) | - | - | - | 1.000 | - | - | 2.0 | 0.900 | 1.8257 | - | 2.00 | \
OOM-killed 1 of 2, ok 1 of 2 |
"""


def test_the_report_of_runs_that_came_to_nothing() -> None:
    loop = Contender("loop", "plain", "run_loop", Path("hf"), "python")
    refused = Run("naive", 10**9, "refused", disk=[2e9], end={"floor": 1_234_000_000})
    runs = [refused, run("loop", 10**9, [2.0], None, status="OOM-killed"), run("loop", 10**9, [3.0, 5.0])]
    result = {
        "facts": ["a machine"], "complete": False, "notes": ["a note"], "contenders": listed(NAIVE, loop),
        "left_out": {"airllm": "give --checkpoint"}, "tables": summarize(runs, [NAIVE, loop], SCRIPT, RATES),
    }  # fmt: skip
    assert markdown(result) == GOLDEN


def test_the_report_of_runs_that_went_well() -> None:
    result = {
        "facts": [], "complete": True, "notes": [], "contenders": listed(*WHO), "left_out": {},
        "tables": summarize(RUNS, WHO, SCRIPT, RATES),
    }  # fmt: skip
    text = markdown(result)
    assert (
        "| 1 | window | 0.450 (0.400-0.500) | 4.44 | 8.89 | 0.33 | 1.000 | 1.000 | 100 | 2.0 | 0.900 | 1.8257 | 222% | "
        "2.00 | ok |"
    ) in text
    assert "| none | llama.cpp-ram | 0.150 (0.100-0.200) | - | - | 1.00 |" in text
    assert "| 1 | naive | 0.40 | 1.100 | 1.000 | 1.000 | +10.0% | 2.000 | 4.000 | -50.0% | 2.000 | -50.0% |" in text
    assert "against the first run of `naive`" in text
    assert "| window | 1 | 0.25 | 9 |" in text
    assert "Incomplete" not in text


def test_the_plot(tmp_path: Path) -> None:
    draw(tmp_path / "p.png", summarize(RUNS, WHO, SCRIPT, RATES)["rows"], "a model")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_to_repeat_it_names_no_folder() -> None:
    here = Path("/some/where")
    wanted = Wanted(
        here / "s.flash", here / "p.flash", here / "hf", True, (here / "m.gguf",), ("q4_0",), here, "python", None,
        (10**9,), ("native",),
    )  # fmt: skip
    task = Task((10**9,), [1, 2], [3], 384, "f16", 3, 1.0, 600.0, False, here)
    assert repeated(wanted, task, here / "book.txt") == (
        "flashinfer bench compare s.flash --memory 1000000000 --packed p.flash --peer-checkpoint hf --text book.txt "
        "--gguf m.gguf --gguf-quant q4_0 --peer-python PYTHON --context 384 -n 1 --prompt-tokens 2 --rounds 3 "
        "--kv-type f16 --only native --no-cgroup"
    )
