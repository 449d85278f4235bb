from __future__ import annotations

from pathlib import Path

import pytest

import flashinfer
from benchmarks.make_checkpoint import make_checkpoint
from flashinfer.units import parse_size
from tests.e2e.program import DEMO, PROMPT, flashinfer_with


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the embedded model. Read only: who damages it takes a copy."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in this checkout")
    store = tmp_path_factory.mktemp("demo") / "demo.flash"
    done = flashinfer_with("pack", DEMO, store)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{store}: llama, ")
    return store


@pytest.fixture(scope="session")
def uncapped(demo: Path) -> str:
    """What the embedded model says greedily when memory does not matter: 16 tokens, and the line's end."""
    with flashinfer.load(demo) as model:
        text = model.generate(PROMPT, max_new_tokens=16, temperature=0.0).text
    assert len(text.split()) > 6
    return text + "\n"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of about 150 MB: large enough to be caught in the middle of packing it."""
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    make_checkpoint(path, family="opt", size=parse_size("150MB"), dtype="f16")
    return path
