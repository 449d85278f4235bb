"""`--adapter` of every command that runs a model: what it changes, what is said of it, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flashinfer
from flashinfer.cli import main
from flashinfer.units import MIB
from tests.adapters import for_demo

CHECKPOINT = Path(flashinfer.__file__).parent / "_demo"
PROMPT = ["-p", "Once upon a time", "-n", "12", "--temperature", "0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("adapted") / "demo.flash"
    flashinfer.pack(CHECKPOINT, path)
    return str(path)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    return [str(for_demo(root / f"adapter-{seed}", seed=seed)) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def quick_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flashinfer.bench.basis.BUFFER", MIB)
    monkeypatch.setattr("flashinfer.bench.basis.ENOUGH", MIB)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    assert main(list(arguments)) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_generate_with_each_of_two(store: str, adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in ([], *(["--adapter", adapter] for adapter in adapters)):
        out, err = said(capsys, "generate", store, *PROMPT, *options)
        assert ("with an adapter: calibrated predictors are not used" in err) == bool(options)
        texts.append(out)
    assert len(set(texts)) == 3
    with flashinfer.load(store, adapter=adapters[0], weight_memory="5MiB") as model:
        assert model.generate(PROMPT[1], max_new_tokens=12, temperature=0).text + "\n" == texts[1]


def test_a_session_belongs_to_store_and_adapter(
    store: str, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [*PROMPT, "--session", str(tmp_path / "kept")]
    said(capsys, "generate", store, *kept, "--adapter", adapters[0])
    for options in ([], ["--adapter", adapters[1]]):
        out, err = said(capsys, "generate", store, *kept, *options, status=1)
        assert (out, err.count("\n")) == ("", 1)
        assert "belongs to another weight store or adapter" in err
    said(capsys, "generate", store, *kept, "--adapter", adapters[0])


def test_plan_has_a_line_for_it(store: str, adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--seconds", "0.001", "--memory", "60%"]
    out, _ = said(capsys, "plan", store, "--adapter", adapters[0], *quick)
    (line,) = (line for line in out.splitlines() if line.startswith("  adapter "))
    assert "calibrated predictors are not used" in out
    out, _ = said(capsys, "plan", store, "--adapter", adapters[0], *quick, "--json")
    plan = json.loads(out)["plan"]
    assert plan["weight_adapter"] == 4 * 4 * 5 * (2 * (192 + 192) + 3 * (1536 + 192))
    assert "465 KiB" in line
    out, _ = said(capsys, "plan", store, *quick)
    assert "adapter" not in out


def test_eval_judges_with_it(
    store: str, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little dog who liked to run in the park. " * 4)
    brief = ["--text", str(text), "--tokens", "40", "--decode-tokens", "0", "--greedy-tokens", "0", "--json"]
    found = []
    for options in ([], ["--adapter", adapters[0]]):
        out, _ = said(capsys, "eval", store, *brief, *options)
        found.append(json.loads(out)["rows"][0]["perplexity"])
    assert found[0] != found[1]


@pytest.mark.parametrize("command", ["generate", "plan", "chat", "bench generate", "eval"])
def test_one_that_is_not_there(store: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("Once upon a time. " * 40)
    brief = ["--text", str(tmp_path / "text"), "--tokens", "32"]
    more = {"generate": PROMPT, "chat": ["--chat-template", "vicuna"], "eval": brief}
    arguments = [*command.split(), store, *more.get(command, []), "--adapter", str(tmp_path)]
    out, err = said(capsys, *arguments, status=1)
    assert out == ""
    assert f"flashinfer: error: {tmp_path} has no adapter_config.json: it is no adapter" in err.splitlines()[-1]


def test_a_predictor_that_was_learnt_without_it(
    store: str, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", adapters[0], "--predictor", "low-rank"]
    _, err = said(capsys, "generate", store, *PROMPT, *options, status=1)
    assert err.count("\n") == 1
    assert "the low-rank predictor belongs to a store without an adapter" in err
