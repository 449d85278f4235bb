"""Ctrl-C is one line and status 1 wherever it strikes, also where Python itself would lose it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.cli.command_line import ROOT

CALLBACK = "import weakref; x = type('X', (), {})(); r = weakref.ref(x, lambda _: strike()); del x; time.sleep(20)"
"""Python prints and drops what is raised here."""
EXEC = "exec('strike()')"
"""Python remembers a KeyboardInterrupt that came through here, and ends with that signal's status."""
PROGRAM = """
import os, signal, sys, time
import flashinfer_offload as _entry
signal.signal(signal.SIGINT, signal.default_int_handler)
def strike():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
def body():
    {}
_entry._run = body
sys.exit(_entry.main())
"""


@pytest.mark.parametrize("where", [CALLBACK, EXEC, "strike()"])
def test_wherever_it_strikes(where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(where)], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "flashinfer: interrupted\n")


def test_who_is_told_to_ignore_it_does() -> None:
    """As a background job of a shell without job control is."""
    done = subprocess.run(
        [sys.executable, "-m", "flashinfer", "--version"], capture_output=True, cwd=ROOT, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0
