"""The public names are these, and importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import flashinfer


def test_the_names() -> None:
    assert sorted(flashinfer.__all__) == ["FlashInferError", "Plan", "TextModel", "load", "pack"]
    assert flashinfer.__distribution__ == "flashinfer-offload"
    for name in flashinfer.__all__:
        assert getattr(flashinfer, name).__name__ == name


def test_a_subpackage_does_not_hide_the_function_of_its_name() -> None:
    code = "import flashinfer, flashinfer.pack, flashinfer.generate; sys.exit(type(flashinfer.pack).__name__)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, timeout=60)
    assert done.stderr == "function\n"


def test_anything_else_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unpack'"):
        flashinfer.unpack  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, flashinfer; sys.exit(bool({'numpy', 'torch', 'typer', 'msgspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
