"""How a contender's process is started: the Python it runs under, and the only package of ours that Python sees."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashinfer.bench.compare.contenders import PEERS, Contender
from flashinfer.errors import PeerError

PEERS_FOLDER = Path(__file__).parent / "peers"
_FIND = (
    "import importlib.util as u, json, sys; print(json.dumps([n for n in sys.argv[1:] if u.find_spec(n) is not None]))"
)


@contextlib.contextmanager
def only_peers() -> Iterator[Path]:
    """A working directory in which `python -m peers.NAME` works and no other module of ours is in the way: the other
    Python has its own numpy and torch, and need not have flashinfer."""
    with tempfile.TemporaryDirectory(prefix="flashinfer-compare-") as folder:
        (Path(folder) / "peers").symlink_to(PEERS_FOLDER, target_is_directory=True)
        yield Path(folder)


def command_of(contender: Contender, job: dict[str, object]) -> list[str]:
    """The command line of one run, for a working directory of `only_peers`."""
    module = "flashinfer.bench.compare.ours" if contender.rung else f"peers.{contender.module}"
    return [contender.python, "-m", module, json.dumps(job)]


def find_python(name: str) -> str:
    """Where that Python lies, from whatever working directory; a link stays one, for that is what a venv is. Raises
    PeerError: there is none."""
    found = shutil.which(name)
    if found is None:
        raise PeerError(f"{name} is no program; give the Python of the other programs with --peer-python")
    return str(Path(found).absolute())


def modules_of(python: str) -> frozenset[str]:
    """Which of the modules that peers need this Python has. Raises PeerError: it is no Python."""
    wanted = sorted({name for peer in PEERS for name in (*peer.needs, "gguf")})
    try:
        found = subprocess.run([python, "-c", _FIND, *wanted], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise PeerError(f"{python} does not run ({e}); give the Python of the other programs with --peer-python") from e
    return frozenset(json.loads(found))


OUR_PYTHON = sys.executable
"""Ours run under the Python that this is."""
