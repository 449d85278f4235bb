"""`generate --trace FILE`: a timeline that is whole, or an error that costs no text."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

from tests.e2e.program import PROMPT, assert_failed, assert_interrupted, ended, flashinfer_with, names_in, started

OPTIONS = ("-p", PROMPT, "-n", "16", "--temperature", "0", "--weight-memory", "2MiB")


def test_every_token_and_layer(demo: Path, uncapped: str, tmp_path: Path) -> None:
    done = flashinfer_with("generate", demo, *OPTIONS, "--trace", tmp_path / "t.json", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["text"] + "\n" == uncapped
    events = json.loads((tmp_path / "t.json").read_text())
    spans = [e["name"] for e in events if e["ph"] == "X"]
    layers = len(result["plan"]["slots"])
    assert (spans.count("load"), spans.count("prefill"), spans.count("decode")) == (1, 1, 15)
    assert spans.count("attention") == spans.count("ffn") == 16 * layers
    assert spans.count("embedding") == spans.count("head") == 16
    read = sum(account["bytes_read"] for account in result["ledger"].values())
    assert sum(e["args"]["bytes"] for e in events if e["ph"] == "b") == read
    assert names_in(tmp_path) == ["t.json"]


def test_ctrl_c_leaves_a_whole_file(demo: Path, tmp_path: Path) -> None:
    process = started("generate", demo, *OPTIONS, "-n", "400", "--trace", tmp_path / "t.json")
    assert process.stdout is not None
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    assert_interrupted(ended(process))
    assert len(json.loads((tmp_path / "t.json").read_text())) > 100
    assert names_in(tmp_path) == ["t.json"]


def test_a_place_that_cannot_be_written_to(demo: Path, tmp_path: Path) -> None:
    for place, part in (
        (tmp_path, "is not a file"),
        ("/dev/null", "is not a file"),
        (tmp_path / "no" / "t", "No such"),
    ):
        assert_failed(flashinfer_with("generate", demo, *OPTIONS, "--trace", place), "trace", part, "another")
    assert names_in(tmp_path) == []


def test_a_full_disk_costs_no_text(demo: Path, uncapped: str, tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    (tmp_path / "t.json").write_text("the one before")
    done = flashinfer_with("generate", demo, *OPTIONS, "--trace", tmp_path / "t.json", preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, uncapped)
    summary, error = done.stderr.splitlines()
    assert summary.startswith("16 tokens (length)")
    assert error.startswith(f"flashinfer: error: trace {tmp_path / 't.json'} cannot be written: File too large")
    assert names_in(tmp_path) == ["t.json"]
    assert (tmp_path / "t.json").read_text() == "the one before"
