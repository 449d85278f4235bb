"""`flashinfer generate` on a fake engine: where the prompt comes from and what is printed where."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import flashinfer.generate
from flashinfer import cli
from flashinfer.generate import TextModel
from tests.generate.fake import LetterTokenizer, fake_model


class Loaded:
    """Stands in for `load`; keeps what it was called with."""

    def __init__(self) -> None:
        self.model, self.engine = fake_model("hello ")
        self.arguments: dict[str, Any] = {}

    def __call__(self, store: Path, **arguments: Any) -> TextModel:
        self.arguments = {"store": store, **arguments}
        return self.model


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    fake = Loaded()
    monkeypatch.setattr(flashinfer.generate, "load", fake)
    return fake


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, tty: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stdin, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr("sys.stdin", stdin)


def test_text_to_stdout_and_a_summary_to_stderr(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a.flash", "-p", "abc", "-n", "8"]) == 0
    out, err = capsys.readouterr()
    assert out == "hello he\n"
    assert err.count("\n") == 1
    for part in ("8 tokens (length)", "tokens/s (predicted 4)", "read per token", "hit rate", "disk curve default"):
        assert part in err
    assert loaded.engine.closes == 1


def test_one_json_object(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a.flash", "-p", "abc", "--stop", "lo", "--stop", "zz", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema_version"] == 1
    assert (result["text"], result["finish_reason"]) == ("hel", "stop")
    assert result["prompt_tokens"] == LetterTokenizer().encode("abc")
    assert set(result["timings"]) == {"first_token", "decode", "decode_tokens_per_second"}
    assert set(result["ledger"]) == {"load", "prefill", "decode"}
    assert result["plan"] == {"context": 64}
    assert result["predicted"]["tokens_per_second"] == 4
    assert result["predicted"]["basis"]["disk_measured"] is False


def test_a_broken_cap_is_an_error_after_all_output(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    loaded.engine.over_cap = True
    assert cli.main(["generate", "a.flash", "-p", "abc", "-n", "5"]) == 1
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert err.splitlines()[-1] == "flashinfer: error: grew beyond the cap"


def test_options_reach_load(loaded: Loaded) -> None:
    options = ["--memory", "1GiB", "--window", "9", "--io-objective", "bytes", "--threads", "2"]
    options += ["--context", "32", "--device", "cuda", "--backend", "torch", "--kv-type", "f16"]
    options += ["--predictor", "low-rank:0.98", "--max-ppl-increase", "2%", "--adapter", "a.lora", "--vram", "6GiB"]
    options += ["--reader", "kvikio"]
    assert cli.main(["generate", "a.flash", "-p", "abc", *options]) == 0
    assert loaded.arguments == {
        "store": Path("a.flash"), "memory": 1 << 30, "weight_memory": None, "vram": 6 << 30, "window": 9,
        "io_objective": "bytes", "reader": "kvikio", "threads": 2, "context": 32, "device": "cuda", "backend": "torch",
        "kv_type": "f16", "trace": None, "predictor": "low-rank:0.98", "max_ppl_increase": 0.02,
        "adapter": Path("a.lora"),
    }  # fmt: skip


def test_the_other_cap(loaded: Loaded) -> None:
    assert cli.main(["generate", "a.flash", "-p", "abc", "--weight-memory", "5MB"]) == 0
    assert loaded.arguments["weight_memory"] == 5_000_000
    assert loaded.arguments["memory"] is None


def test_the_prompt_from_a_file(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abc\r\n")
    assert cli.main(["generate", "a.flash", "-f", str(file), "-n", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == LetterTokenizer().encode("abc")


@pytest.mark.parametrize("arguments", [[], ["-f", "-"]])
def test_the_prompt_from_stdin(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    give_stdin(monkeypatch, b"abc\n")
    assert cli.main(["generate", "a.flash", "-n", "5", *arguments]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_no_prompt_and_two_prompts_are_wrong_usage(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"", tty=True)
    assert cli.main(["generate", "a.flash"]) == 2
    assert "no prompt" in capsys.readouterr().err
    assert cli.main(["generate", "a.flash", "-p", "a", "-f", "b"]) == 2
    assert "not both" in capsys.readouterr().err
    assert loaded.arguments == {}


def test_prompts_that_cannot_be_used(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for arguments, part in (
        (["-f", str(tmp_path / "missing")], "No such file"),
        (["-f", str(tmp_path)], "Is a directory"),
        (["-f", str(latin)], "not UTF-8 (byte 3)"),
        (["-p", ""], "empty"),
        (["-p", "a" * 64], "context of 64"),
    ):
        assert cli.main(["generate", "a.flash", *arguments]) == 1
        err = capsys.readouterr().err
        assert part in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--min-p", "2"],
        ["--top-k", "-1"],
        ["--seed", "-1"],
        ["--repetition-penalty", "0"],
        ["--stop", ""],
        ["--memory", "much"],
        ["--memory", "1GiB", "--weight-memory", "1GiB"],
        ["--device", "tpu"],
        ["--io-objective", "luck"],
        ["--backend", "abacus"],
        ["--kv-type", "f8"],
        ["--session", "a", "--trace", "a"],
    ],
)
def test_values_that_cannot_be_are_wrong_usage(
    loaded: Loaded, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "a.flash", "-p", "abc", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert loaded.arguments == {}


def test_an_interruption_is_one_line_and_closes_the_model(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, steps = loaded.engine.step, iter(range(3))

    def interrupted(*arguments: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loaded.engine, "step", interrupted)
    assert cli.main(["generate", "a.flash", "-p", "abc"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("hel", "flashinfer: interrupted\n")
    assert (loaded.engine.closes, loaded.engine.open_sessions) == (1, 0)
