"""The real kvikio, where it is installed.

The stand-in is compared with it; it reads with a driver whose device memory is the host's (`kvikio_on_stub.py`), and to
a card where there is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashinfer.errors import PlatformError
from flashinfer.io import Reader, kvikio
from tests.io.device_memory import AsHostReader, on_card
from tests.io.kvikio_stand_in import CompatMode, StandIn, opened
from tests.io.reader_conformance import ReaderConformance, extents
from tests.io.test_thread_reader import write


def why_no_card() -> str | None:
    """Why the real kvikio does not read to a card here."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    try:
        kvikio.load_kvikio(Path(__file__))
    except PlatformError as error:
        return str(error)
    return None


@pytest.mark.skipif(why_no_card() is not None, reason=why_no_card() or "")
class TestToACard(ReaderConformance):
    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Reader]:
        self.paths = write(tmp_path, self.blobs)
        self.opened = opened(self.paths)
        yield AsHostReader(self.opened, on_card)
        self.opened.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        pytest.skip("nothing here makes a disk fail")

    def test_bad_targets_are_refused(self, reader: Reader) -> None:
        """Made on the card: a copy of a bad one of the host's is a good one there."""
        there = torch.zeros(16384, dtype=torch.uint8, device="cuda")
        for bad in (there[1:8193], there[::2], there.view(torch.int16), there.reshape(4, 4096), there.cpu()):
            with pytest.raises(ValueError):
                self.opened.submit_to_device(0, extents((0, 4096, 0)), bad)


def test_the_real_one_reads_with_a_driver_that_has_no_card(tmp_path: Path) -> None:
    """The driver is a library that is compiled here, in a process of its own, which it is loaded into first."""
    kvikio_or_skip()
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler")
    here, driver = Path(__file__).parent, tmp_path / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
    subprocess.run([*build, str(here / "stub_driver.c")], check=True, timeout=60)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "kvikio_on_stub.py")]
    environment = os.environ | {"LD_PRELOAD": str(driver)}
    environment.pop("KVIKIO_COMPAT_MODE", None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=here.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def kvikio_or_skip() -> Any:
    """The real one."""
    try:
        return importlib.import_module("kvikio")
    except Exception as error:
        pytest.skip(f"kvikio cannot be imported here: {' '.join(str(error).split())}")


def test_the_stand_in_has_the_signatures_of_the_real_one() -> None:
    real, fake = kvikio_or_skip(), StandIn()
    calls = ["CuFile", "CuFile.pread", "CuFile.close", "CuFile.is_direct_io_supported", "bounce_buffer_free"]
    calls += ["defaults.get", "defaults.set", "defaults.is_compat_mode_preferred"]
    calls += ["cufile_driver.get", "cufile_driver.libcufile_version"]
    for name in ("defaults", "cufile_driver"):
        importlib.import_module(f"kvikio.{name}")
    for call in calls:
        assert arguments(found(fake, call)) == arguments(found(real, call)), call
    assert {mode.name for mode in CompatMode} == {mode.name for mode in real.CompatMode}


def found(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def arguments(call: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(call).parameters.values()]
