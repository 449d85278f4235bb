"""`flashinfer calibrate` as a process: what it says, what it refuses in one line, a kill, and the cap it keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from flashinfer import pack
from flashinfer.store import StoreUpdate, open_store, verify
from flashinfer.tune.work import NAME
from tests.cgroup import drop_page_cache, run_limited
from tests.checkpoints import make_llama, make_opt
from tests.e2e.program import (
    ENVIRONMENT,
    assert_failed,
    assert_interrupted,
    command,
    ended,
    flashinfer_with,
    started,
    wait_until,
)
from tests.tune.calibrating import contents, copy_of, make_store, words

QUICK = ("--tokens", "128", "--held-out", "32", "--context", "32", "--budget", "25%", "--level", "0.9")
STORY = "Once upon a time there was a little girl. She had a red ball, and the dog ran after the ball to the park.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(200))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ReLU model. Read only: who calibrates takes a copy."""
    return make_store(tmp_path_factory.mktemp("relu"), "relu")


@pytest.fixture(scope="module")
def calibrated(packed: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model, calibrated without an interruption, and what `--json` said. Read only."""
    path = copy_of(packed, tmp_path_factory.mktemp("calibrated") / "store")
    done = flashinfer_with("calibrate", path, "--text", text, *QUICK, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    return path, json.loads(done.stdout)


def said(store: Path, *options: str) -> str:
    """What the model answers."""
    done = flashinfer_with("generate", store, "-p", "Once upon", "-n", "8", "--temperature", "0", *options)
    assert done.returncode == 0, done
    assert done.stdout.strip()
    return done.stdout


class TestWhatItSays:
    def test_json(self, calibrated: tuple[Path, dict[str, Any]], packed: Path) -> None:
        path, report = calibrated
        m = open_store(path).manifest
        assert (report["schema_version"], report["command"], report["resumed"]) == (1, "calibrate", False)
        assert report["predictor_bytes"] == m.predictor_bytes() > 0
        assert report["weight_bytes"] == m.weight_bytes()
        found = report["calibration"]
        assert (found["tokens"], found["held_out"]) == (128, 32)
        assert [*found["statistics"]] == ["exact", "certified", "low-rank"]
        assert [level["target"] for level in found["levels"]] == [0.9, 0.95]
        assert found["levels"][found["chosen"]["low-rank"]]["target"] == 0.95
        assert said(path) == said(packed)

    def test_for_people(self, text: Path, tmp_path: Path) -> None:
        path = make_store(tmp_path, "silu")
        done = flashinfer_with("calibrate", path, "--text", text, *QUICK, "--density", "0.5")
        assert (done.returncode, done.stderr) == (0, ""), done
        lines = done.stdout.splitlines()
        assert lines[0] == "calibrated on 128 tokens, judged by 32 others"
        assert re.fullmatch(r"  threshold: a token needs \d+\.\d% of the neurons", lines[1])
        assert re.fullmatch(r"  predictors: 1\.50 KiB, \d\.\d% of the weights", lines[2])
        row = r"  --predictor threshold:(0\.\d+): names \d+\.\d% of the neurons, perplexity [\d.]+ \([+-][\d.]+%\)(.*)"
        levels = [re.fullmatch(row, line) for line in lines[3:]]
        assert [(n[1], n[2]) for n in levels if n] == [("0.9", ""), ("0.5", " <- used when nobody says")]
        assert len(levels) == 2
        assert max(map(len, lines)) <= 120
        said(path, "--predictor", "threshold:0.9")

    def test_help_has_every_option(self) -> None:
        done = flashinfer_with("calibrate", "--help")
        assert done.returncode == 0
        for option in ("--text", "--memory", "--predictor", "--budget", "--no-order", "--density", "--json"):
            assert option in done.stdout


class TestWhatItRefuses:
    @pytest.mark.parametrize(
        ("data", "options", "parts"),
        [
            (b"", (), ("text.txt is empty",)),
            (b"Once upon \xff a time", (), ("text.txt is not UTF-8: byte 10 ",)),
            (STORY.encode(), (), ("text.txt has ", "calibration takes 128 at least", "--context (now 64)")),
            (None, (), ("cannot read", "text.txt", "No such file")),
            (STORY.encode() * 20, ("--predictor", "threshold"), ("a threshold predictor does not suit relu",)),
            (STORY.encode() * 20, ("--budget", "0.01%", *QUICK[:6]), ("do not fit", "raise --budget")),
            (STORY.encode() * 20, ("--memory", "1MB", *QUICK), ("the cap is 977 KiB", "raise --memory")),
        ],
    )
    def test_what_cannot_be_used(self, packed: Path, tmp_path: Path, data: bytes | None, options, parts) -> None:
        store, path = copy_of(packed, tmp_path / "store"), tmp_path / "text.txt"
        before = contents(store)
        if data is not None:
            path.write_bytes(data)
        assert_failed(flashinfer_with("calibrate", store, "--text", path, *options), *parts)
        assert contents(store) == before

    def test_a_cap_below_what_a_step_takes(self, packed: Path, text: Path, tmp_path: Path) -> None:
        """It is refused before anything is run, and names only steps that are asked for."""
        store = copy_of(packed, tmp_path / "store")
        arguments = ("calibrate", store, "--text", text, *QUICK, "--predictor", "certified", "--no-order", "--memory")
        done = flashinfer_with(*arguments, "1MB")
        assert_failed(done, "rewriting the weights takes 64.0 MiB", "raise --memory")
        assert json.loads((store / NAME / "state.json").read_bytes())["done"] == {}

    def test_a_store_without_a_tokenizer(self, text: Path, tmp_path: Path) -> None:
        pack(make_llama(tmp_path / "checkpoint"), tmp_path / "store")
        assert_failed(flashinfer_with("calibrate", tmp_path / "store", "--text", text), "the store has no tokenizer")

    def test_a_model_that_needs_every_neuron(self, text: Path, tmp_path: Path) -> None:
        pack(make_opt(tmp_path / "checkpoint", activation_function="gelu"), tmp_path / "store")
        done = flashinfer_with("calibrate", tmp_path / "store", "--text", text)
        assert_failed(done, "every neuron is needed", "nothing to calibrate")

    def test_what_is_no_store(self, text: Path, tmp_path: Path) -> None:
        done = flashinfer_with("calibrate", tmp_path / "nothing", "--text", text)
        assert_failed(done, "does not exist", "flashinfer pack")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_store_that_cannot_be_written(self, packed: Path, text: Path, tmp_path: Path) -> None:
        store = copy_of(packed, tmp_path / "store")
        store.chmod(0o555)
        try:
            done = flashinfer_with("calibrate", store, "--text", text, *QUICK)
        finally:
            store.chmod(0o755)
        assert_failed(done, "cannot be written to", "copy it to another place")

    def test_two_at_once(self, packed: Path, text: Path, tmp_path: Path) -> None:
        store = copy_of(packed, tmp_path / "store")
        with StoreUpdate(open_store(store)):
            done = flashinfer_with("calibrate", store, "--text", text, *QUICK)
        assert_failed(done, f"{store} is being written by another process; wait for it to end")

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--predictor", "magic"), "--predictor"),
            (("--predictor", "exact"), "calibration makes certified, low-rank, threshold"),
            (("--budget", "lots"), "--budget"),
            (("--max-ppl-increase", "-1%"), "--max-ppl-increase"),
            (("--memory", "much"), "--memory"),
            (("--recall", "1.5"), "--recall"),
            (("--density", "0"), "--density"),
            (("--tokens", "1"), "--tokens"),
            (("--level", "2"), "--level"),
            (("--threads", "-1"), "--threads"),
            (("--backend", "abacus"), "--backend"),
        ],
    )
    def test_wrong_usage(self, packed: Path, text: Path, options: tuple[str, ...], part: str) -> None:
        assert_failed(flashinfer_with("calibrate", packed, "--text", text, *options), part, status=2)

    def test_no_text(self, packed: Path) -> None:
        assert_failed(flashinfer_with("calibrate", packed), "--text", status=2)


class TestPredictorsOfAnotherStore:
    @pytest.fixture
    def mixed(self, calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
        """A store of the same shape, with the calibration and the predictors of another one."""
        path, other = make_store(tmp_path, "relu", seed=9), open_store(calibrated[0])
        manifest, theirs = (json.loads((p / "manifest.json").read_text()) for p in (path, other.root))
        for entry in (other.manifest.predictors, other.manifest.sections["calibration"]):
            assert entry is not None
            shutil.copy(other.path_of(entry), path / entry.name)
        manifest["sections"], manifest["predictors"] = theirs["sections"], theirs["predictors"]
        lowrank = {role: t for role, t in theirs["tensors"].items() if ".lowrank." in role}
        manifest["tensors"] |= lowrank
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    def test_they_are_refused_and_can_be_replaced(self, mixed: Path, text: Path) -> None:
        asked = ("generate", mixed, "-p", "Once upon", "-n", "2", "--temperature", "0", "--predictor")
        for predictor in ("low-rank", "low-rank:0.9", "auto"):
            assert_failed(
                flashinfer_with(*asked, predictor), "was made for other weights", "run `flashinfer calibrate` again"
            )
        done = flashinfer_with("calibrate", mixed, "--text", text, *QUICK)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert flashinfer_with(*asked, "low-rank").returncode == 0


class TestKilled:
    def killed(self, store: Path, text: Path, step: str, how: signal.Signals) -> Any:
        """Kill a calibration as soon as that step is done."""
        state = store / NAME / "state.json"

        def reached() -> bool:
            try:
                return step in json.loads(state.read_bytes())["done"]
            except (OSError, ValueError):
                return False

        process = started("calibrate", store, "--text", text, *QUICK)
        wait_until(reached, process)
        process.send_signal(how)
        return ended(process)

    @pytest.mark.parametrize("step", ["windows 0 to 5", "judging exact"])
    def test_it_goes_on(
        self, packed: Path, calibrated: tuple[Path, Any], text: Path, step: str, tmp_path: Path
    ) -> None:
        store = copy_of(packed, tmp_path / "store")
        before = contents(store)
        assert self.killed(store, text, step, signal.SIGKILL).returncode == -signal.SIGKILL
        now = contents(store)
        assert now.items() >= before.items()
        assert verify(open_store(store)) == []
        assert said(store) == said(packed)
        done = flashinfer_with("calibrate", store, "--text", text, *QUICK, "--json")
        assert (done.returncode, done.stderr) == (0, "went on with what an earlier calibration had done\n"), done
        assert json.loads(done.stdout)["resumed"]
        assert contents(store) == contents(calibrated[0])
        assert not (store / NAME).exists()

    def test_ctrl_c(self, packed: Path, text: Path, tmp_path: Path) -> None:
        store = copy_of(packed, tmp_path / "store")
        before = contents(store)
        assert_interrupted(self.killed(store, text, "windows 0 to 5", signal.SIGINT))
        assert contents(store) == before


class TestCap:
    """A model of 150 MB under a cap of half of that above its floor."""

    FLAGS = ("--tokens", "128", "--held-out", "32", "--context", "32", "--level", "0.95", "--threads", "2")
    SPEAK = ("-p", "Once upon a time", "--temperature", "1", "--seed", "3", "--threads", "2")

    @pytest.fixture(scope="class")
    def store(self, large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        store = tmp_path_factory.mktemp("large") / "large.flash"
        pack(large, store)
        return store

    def test_it_is_kept_while_someone_reads(self, store: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text(STORY * 4)
        refused = flashinfer_with("generate", store, *self.SPEAK, "-n", "4", "--context", "32", "--memory", "1MB")
        floor = re.search(r"\((\d+) bytes\)", refused.stderr)
        assert floor is not None
        cap = int(floor[1]) + open_store(store).manifest.weight_bytes() // 2
        arguments = ("calibrate", store, "--text", text, *self.FLAGS, "--memory", str(cap), "--json")
        assert_failed(flashinfer_with(*arguments), "ordering neurons (which --no-order does without)", "raise --memory")

        with flashinfer.load(store, context=64) as model:
            expected = model.generate("Once upon a time", max_new_tokens=32, temperature=1.0, seed=3).text
            reader = started("generate", store, *self.SPEAK, "-n", "32", "--context", "64", "--memory", str(cap))
            drop_page_cache(store)
            limited = run_limited(command(*arguments, "--no-order"), cap, env=ENVIRONMENT)
            assert (limited.returncode, limited.oom_kills, limited.stderr) == (0, 0, "")
            assert 0 < limited.peak < cap
            assert open_store(store).manifest.predictors is not None
            assert model.generate("Once upon a time", max_new_tokens=32, temperature=1.0, seed=3).text == expected
        read = ended(reader)
        assert (read.returncode, read.stdout) == (0, expected + "\n"), read
        report = json.loads(limited.stdout)
        assert [level["target"] for level in report["calibration"]["levels"]] == [0.95]
        said(store, "--memory", str(cap))
        assert verify(open_store(store)) == []
