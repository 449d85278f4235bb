"""An unrelated project, flashinfer-python, installs into the same `flashinfer/` directory: say so, name the fix."""

from __future__ import annotations

import shutil
from pathlib import Path

import flashinfer_offload as _entry
import pytest

import flashinfer
from tests.cli.command_line import ROOT, run

THEIRS = {
    "loads": '__version__ = "0.6.1"\n',
    "needs CUDA": 'raise ImportError("libcuda.so.1: cannot open shared object file")\n',
}


@pytest.fixture(params=THEIRS)
def overwritten(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A site-packages directory with both distributions, theirs unpacked last. (To be seen without `site`: an
    editable installation of ours would come first.)"""
    package = ROOT / "flashinfer"
    shutil.copytree(package, tmp_path / "flashinfer", ignore=shutil.ignore_patterns("__pycache__", "_demo"))
    shutil.copytree(package / "flashinfer_offload", tmp_path / "flashinfer_offload")  # as the wheel does
    (tmp_path / "flashinfer" / "__init__.py").write_text(THEIRS[request.param])
    return tmp_path


def test_our_command_names_the_fix(overwritten: Path, tmp_path: Path) -> None:
    done = run("--version", path=overwritten, module="flashinfer_offload", cwd=tmp_path.parent, site=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert str(overwritten) in done.stderr
    assert "pip uninstall flashinfer-python && pip install --force-reinstall flashinfer-offload" in done.stderr


def test_python_m_flashinfer_names_it_too_where_theirs_can_be_imported(overwritten: Path, tmp_path: Path) -> None:
    done = run("--version", path=overwritten, cwd=tmp_path.parent, site=False)
    if "ImportError" not in done.stderr:  # else their own __init__ failed before any line of ours
        assert "pip uninstall flashinfer-python" in done.stderr
    assert done.returncode == 1


def test_a_missing_init_counts_as_overwritten(overwritten: Path, tmp_path: Path) -> None:
    """What uninstalling theirs leaves behind."""
    (overwritten / "flashinfer" / "__init__.py").unlink()
    done = run("--version", path=overwritten, module="flashinfer_offload", cwd=tmp_path.parent, site=False)
    assert done.returncode == 1
    assert f"the package at {overwritten / 'flashinfer'} is not" in done.stderr


def test_ours_is_ours() -> None:
    assert _entry.shadowed_by() is None
    assert _entry.MARKER.endswith(f'"{flashinfer.__distribution__}"')
    assert run("--version", module="flashinfer_offload").returncode == 0
