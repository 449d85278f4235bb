"""Help, version, and how each kind of error ends: one line on stderr and an exit status."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashinfer import __version__, cli
from flashinfer.errors import StoreError
from tests.cli.command_line import ROOT, run


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in cli.COMMANDS)
    assert run().stdout == done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"flashinfer {name}" in capsys.readouterr().out


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"flashinfer-offload {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect", "no/such/store"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from flashinfer.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'tokenizers', 'sentencepiece', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "store", "-p", "x", "--no-such-option"],
        ["generate", "store", "-p", "x", "-n", "0"],
        ["--log-level", "loud", "inspect", "store"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashinfer: error: ")
    assert err.count("\n") == 1
    assert "--help`)" in err


def test_an_expected_error_is_one_line_and_status_1() -> None:
    done = run("generate", "no/such/store", "-p", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flashinfer: error: no/such/store does not exist")
    assert done.stderr.count("\n") == 1


def test_a_hub_name_says_to_download_it() -> None:
    done = run("generate", "org/model", "-p", "x")
    assert done.returncode == 1
    assert "hub name" in done.stderr


def test_the_traceback_is_shown_only_on_request() -> None:
    for arguments in (("--log-level", "debug", "generate", "no/such"), ("generate", "no/such", "--log-level", "debug")):
        done = run(*arguments, "-p", "x")
        assert done.returncode == 1
        assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (StoreError("the store\nis damaged"), 1, "flashinfer: error: the store is damaged"),
        (KeyboardInterrupt(), 1, "flashinfer: interrupted"),
        (MemoryError(), 1, "flashinfer: error: out of memory; lower --memory, or close other programs"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a/b"), 1, "flashinfer: error: a/b: Input/output error"),
        (OSError("no number"), 1, "flashinfer: error: no number"),
    ],
)
def test_every_error_is_one_line(error: BaseException, status: int, line: str) -> None:
    assert cli.describe(error) == (status, line)


def test_our_own_bugs_are_called_so() -> None:
    status, line = cli.describe(ValueError("operands could not be broadcast"))
    assert status == 1
    assert "ValueError: operands" in line
    assert "bug" in line


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["--version"]) == 1
    assert "Windows is not supported" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "flashinfer", "--version"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_device_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flashinfer", "--version"], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert done.stderr.count(b"\n") == 1
