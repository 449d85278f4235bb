"""`flashinfer bench compare` from one end to the other, on the embedded model; and how it ends where it cannot run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from flashinfer import cli
from flashinfer.bench import cgroup
from flashinfer.bench.cgroup import fresh_group
from flashinfer.bench.compare import contest, disk, series
from flashinfer.bench.compare.contenders import NAMES, Contender
from flashinfer.bench.compare.contest import Run
from flashinfer.bench.compare.launch import find_python, modules_of, only_peers
from flashinfer.bench.compare.script import TEXT, forced_tokens
from flashinfer.config import Rates
from flashinfer.errors import CgroupError, PeerError, TextError
from flashinfer.pack import pack
from flashinfer.store import open_store

DEMO = Path(flashinfer.__file__).parent / "_demo"
CAP = 700_000_000
Command = Callable[..., int]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "demo.flash"
    pack(DEMO, path)
    return path


@pytest.fixture
def compare(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls the command, with everything that only costs time left out."""
    monkeypatch.setattr(contest, "_DROP", tmp_path / "nothing")  # what others have cached stays
    monkeypatch.setattr(contest.os, "sync", lambda: None)
    monkeypatch.setattr(disk, "measure_curve", lambda *_, **__: None)
    monkeypatch.setattr(series, "rates_of", lambda *_: Rates())

    def run(*arguments: object) -> int:
        common = ("--memory", CAP, "--rounds", 1, "-n", 2, "--prompt-tokens", 5, "--probe", 0.02, "--out", tmp_path)
        return cli.main(["bench", "compare", str(store), *map(str, (*common, *arguments))])

    return run


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "compare.json").read_text()))


def need_groups() -> None:
    try:
        with fresh_group(CAP):
            pass
    except CgroupError as e:
        pytest.skip(str(e))


def test_ours_and_a_plain_loop_in_cgroups(
    compare: Command, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_groups()
    assert compare("--packed", store, "--checkpoint", DEMO, *only("naive", "native", "loop")) == 0
    shown, done = capsys.readouterr().out, result(tmp_path)
    assert shown == (tmp_path / "compare.md").read_text() + "\n"
    assert (done["complete"], done["rounds"], [c["name"] for c in done["contenders"]]) == (
        True, 1, ["naive", "native", "loop"],
    )  # fmt: skip
    for row in done["tables"]["rows"]:
        assert row["endings"] == {"ok": 1}
        assert (row["cap"], row["tokens"]) == (CAP, 2)
        assert 0 < row["peak"] < CAP
    naive, native, loop = done["tables"]["rows"]
    assert naive["asked_per_token"] > 5e6  # all of it, for every token
    assert native["asked_per_token"] == 0  # it fits
    assert naive["perplexity"] == pytest.approx(native["perplexity"], rel=1e-4)
    assert loop["perplexity"] == pytest.approx(native["perplexity"], rel=0.01)
    logits = {row["contender"]: row for row in done["tables"]["logits"]}
    assert logits["native"]["identical"]
    assert logits["naive"]["largest_difference"] < 1e-4
    assert 1e-4 < logits["loop"]["largest_difference"] < 0.1  # it computes in f16
    assert (tmp_path / "compare.png").exists()
    assert str(tmp_path) not in shown


def test_without_cgroups_it_says_what_was_capped(
    compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_parents", list)
    monkeypatch.setattr(series.plot, "can_plot", lambda: False)
    assert compare(*only("native")) == 1
    assert capsys.readouterr().err == (
        "flashinfer: error: no memory cgroup can be made here (there are none); try as root, or give --no-cgroup: "
        "then only ours keep a cap\n"
    )
    assert compare("--no-cgroup", *only("native")) == 0
    assert "WITHOUT memory cgroups" in capsys.readouterr().out
    done = result(tmp_path)
    assert done["tables"]["rows"][0]["peak"] > 1e6
    assert any("matplotlib is not installed" in note for note in done["notes"])
    assert not (tmp_path / "compare.png").exists()


def test_an_interrupt_leaves_what_is_done(
    compare: Command, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compete(c: Contender, cap: int, *_: object, **__: object) -> Run:
        if c.name == "native":
            raise KeyboardInterrupt
        return Run(c.name, cap, "timed out", disk=[1e9])

    monkeypatch.setattr(series, "compete", compete)
    assert compare("--no-cgroup", "--packed", store, *only("naive", "native")) == 1
    assert capsys.readouterr().err.endswith("flashinfer: interrupted\n")
    done = result(tmp_path)
    assert (done["complete"], done["rounds"], [r["status"] for r in done["runs"]]) == (False, 0, ["timed out"])
    assert "Incomplete" in (tmp_path / "compare.md").read_text()


def test_the_list_says_who_and_why_not(compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert "--packed" in shown
    assert not (tmp_path / "compare.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "a", "--peer-checkpoint", "b"], "not both"),
        (["--context", "6"], "do not fit --context 6"),
        (["--predictor", "oracle"], "predictor must be one of"),
        (["--memory", "much"], "is not a size"),
    ],
)
def test_wrong_usage(compare: Command, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*arguments) == 2
    assert words in capsys.readouterr().err


def test_errors_are_one_line(compare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--only", "nobody"], "there is no contender 'nobody'"),
        (["--gguf", tmp_path / "m.gguf", "--peer-python", tmp_path / "python"], "is no program"),
        (["--text", tmp_path / "text"], "cannot read"),
    ):
        assert compare("--no-cgroup", *arguments) == 1
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_another_python_sees_only_the_peers() -> None:
    with only_peers() as folder:
        assert [path.name for path in folder.iterdir()] == ["peers"]
        assert (folder / "peers" / "report.py").exists()
    assert "numpy" not in modules_of(sys.executable)  # only what peers need is asked for
    assert "torch" in modules_of(sys.executable)
    assert Path(find_python("sh")).is_absolute()
    with pytest.raises(PeerError, match="does not run"):
        modules_of(str(shutil.which("false")))


def test_prompt_and_script_follow_each_other_in_the_text(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    prompt, script = forced_tokens(opened, None, 6, 4)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    assert forced_tokens(opened, tmp_path / "text", 7, 3) == ([*prompt, script[0]], script[1:])
    with pytest.raises(TextError, match="give a longer one with --text"):
        forced_tokens(opened, None, 10_000, 1)
