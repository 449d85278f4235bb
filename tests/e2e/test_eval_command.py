"""`flashinfer eval` as a process: what it says, what it refuses in one line, the cap it keeps, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from flashinfer import load, pack
from flashinfer.engine import Model
from flashinfer.tune.perplexity import Protocol, bos_of, perplexity
from flashinfer.tune.text import read_tokens
from flashinfer.units import MIB
from tests.cgroup import drop_page_cache, run_limited
from tests.checkpoints import make_llama
from tests.e2e.program import (
    DEMO,
    ENVIRONMENT,
    assert_failed,
    assert_interrupted,
    command,
    ended,
    flashinfer_with,
    names_in,
    started,
    wait_until,
)
from tests.tune.predictor_stores import lowrank_store

STORY = (
    "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog. One day, the dog ran "
    "away with the ball. Lily was sad. She looked in the garden and in the park. Her friend Tom helped her.\n"
) * 6
QUICK = ("--context", "64", "--tokens", "200", "--decode-tokens", "4", "--rounds", "1", "--greedy-tokens", "4")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def calibrated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with low-rank factors at three levels, the coarsest last."""
    return lowrank_store(DEMO, tmp_path_factory.mktemp("calibrated") / "demo.flash", 64, [0.5, 0.2, 0.0])


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    done = flashinfer_with("eval", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_perplexity_and_its_protocol(demo: Path, text: Path) -> None:
    said = evaluated(
        demo, "--text", text, "--context", "64", "--stride", "32", "--tokens", "200", "--decode-tokens", "4"
    )
    with load(demo) as model:
        tokenizer = model.tokenizer
    protocol, tokens = Protocol(64, 32, bos_of(tokenizer)), read_tokens(text, tokenizer, 200)
    with Model.open(demo, context=64) as model:
        score = perplexity(model, tokens.ids, protocol)
    assert said["schema_version"] == 1
    assert said["text"] == {"tokens": 200, "bytes": len(STORY), "xxh3": tokens.xxh3}
    assert said["protocol"] == {"context": 64, "stride": 32, "bos": 1, "tokens": 200}
    assert said["against"] is None
    [row] = said["rows"]
    assert row["perplexity"] == pytest.approx(score.perplexity, rel=1e-9)
    assert (row["predictor"], row["kind"], row["approximation"], row["kl"]) == ("exact", "exact", None, None)
    assert 1 < row["perplexity"] < 20
    assert 0.05 < row["density"] < 0.12
    assert row["decode"]["bytes_read"] == 0  # it fits
    assert said["decode"] == {"prompt": 60, "tokens": 4, "rounds": 3}
    assert 0 < row["decode"]["seconds_range"][0] <= row["decode"]["seconds"] <= row["decode"]["seconds_range"][1]


def test_the_table_fits_80_columns_and_names_approximations(calibrated: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    done = flashinfer_with(
        "eval", calibrated, "--text", text, *QUICK, "--sweep", "--predictor", "certified", "--weight-memory", "6MiB",
        "--plot", plot,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    table, notes = done.stdout[: done.stdout.index("200 tokens scored")], done.stdout[done.stdout.index("200 tokens") :]
    assert max(map(len, table.splitlines())) <= 80
    rows = re.findall(r"^ ?(exact|certified|low-rank:\S+) +(\d+\.\d+)", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["exact", "certified", "low-rank:0.9", "low-rank:0.91", "low-rank:0.92"]
    assert rows[0][1] == rows[1][1]
    for heading in ("perplexity", "KL", "top-1", "common", "recall", "precision", "named", "read", "reads", "hits"):
        assert heading in table
    assert "context 64, stride 63, BOS 1" in notes
    assert notes.count("approximates: low-rank predictor at recall") == 3
    assert "in layer" in notes
    drawn = plot.read_text()
    assert "<svg" in drawn


def test_predictors_are_held_against_exact(calibrated: Path, text: Path) -> None:
    said = evaluated(calibrated, "--text", text, *QUICK, "--predictor", "low-rank", "--predictor", "all")
    exact, low, everyone = said["rows"]
    assert said["against"] == "exact"
    assert (exact["kind"], exact["increase"]) == ("certified", None)
    assert low["increase"] == pytest.approx(low["perplexity"] / exact["perplexity"] - 1)
    assert low["approximation"].startswith("low-rank predictor at recall 0.9")
    assert 0 < low["recall"] < 1
    assert len(low["layers"]) == 5
    assert low["greedy"]["of"] == 4
    assert len(low["greedy"]["common"]) == 4
    assert (everyone["density"], everyone["recall"], everyone["approximation"]) == (1.0, 1.0, None)
    assert everyone["kl"] == pytest.approx(0.0, abs=1e-6)
    assert everyone["top1_agreement"] == 1.0


@pytest.mark.parametrize(
    ("data", "options", "parts"),
    [
        (b"", (), ("is empty",)),
        (b"abc \xff", (), ("is not UTF-8: byte 4 ",)),
        (b"Once upon a time", (), ("a window takes 511", "--context")),
        (None, (), ("No such file",)),
        (STORY.encode(), ("--predictor", "low-rank"), ("no low-rank predictor", "flashinfer calibrate")),
        (STORY.encode(), ("--predictor", "threshold:0.3"), ("no threshold predictor", "flashinfer calibrate")),
        (STORY.encode(), ("--sweep",), ("no calibrated levels", "flashinfer calibrate")),
        (STORY.encode(), ("--context", "256", "--plot", "plot.xyz"), (".png",)),
        (STORY.encode(), ("--context", "256", "--memory", "1MB"), ("for scoring a text", "bytes)")),
    ],
)
def test_what_cannot_be_used(demo: Path, tmp_path: Path, data: bytes | None, options: tuple[str, ...], parts) -> None:
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    assert_failed(flashinfer_with("eval", demo, "--text", path, *options), *parts)


def test_a_store_without_a_tokenizer(tmp_path: Path, text: Path) -> None:
    pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
    assert_failed(flashinfer_with("eval", tmp_path / "store", "--text", text), "the store has no tokenizer")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--predictor", "best"), ("--predictor",)),
        (("--against", "low-rank"), ("--against",)),
        (("--context", "64", "--stride", "64"), ("stride", "1..63")),
        (("--context", "128", "--tokens", "64"), ("--tokens",)),
        (("--plot", "a.png", "--decode-tokens", "0"), ("--decode-tokens",)),
    ],
)
def test_wrong_usage(demo: Path, text: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_failed(flashinfer_with("eval", demo, "--text", text, *options), *parts, status=2)


def test_the_cap_is_kept(calibrated: Path, text: Path) -> None:
    arguments = ("eval", calibrated, "--text", text, *QUICK, "--predictor", "low-rank", "--memory")
    refused = flashinfer_with(*arguments, "1MB")
    assert_failed(refused, "below the floor")
    floor = re.search(r"\((\d+) bytes\)", refused.stderr)
    assert floor is not None
    cap = int(floor[1]) + MIB
    drop_page_cache(calibrated)
    limited = run_limited(command(*arguments, str(cap), "--json"), cap, env=ENVIRONMENT)
    assert (limited.returncode, limited.oom_kills) == (0, 0), limited.stderr
    assert 0 < limited.peak < cap
    said = json.loads(limited.stdout)
    assert said["peak_memory"] <= cap
    whole = evaluated(*arguments[1:-1])
    assert [row["nll"] for row in said["rows"]] == pytest.approx([row["nll"] for row in whole["rows"]], rel=1e-6)


def test_ctrl_c_leaves_nothing(calibrated: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(STORY * 40)
    before = names_in(calibrated.parent), names_in(calibrated)
    process = started("eval", calibrated, "--text", path, "--tokens", "20000", "--predictor", "low-rank")

    def waits_in_a_file() -> bool:
        links = Path(f"/proc/{process.pid}/fd")
        try:
            return any("(deleted)" in str(link.readlink()) for link in links.iterdir())
        except OSError:
            return False

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    wait_until(waits_in_a_file, process)
    process.send_signal(signal.SIGINT)
    assert_interrupted(ended(process))
    assert (names_in(calibrated.parent), names_in(calibrated)) == before
