"""What `generate` refuses, and how it ends when it is interrupted or nobody listens any more."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.program import PROMPT, assert_failed, assert_interrupted, ended, flashinfer_with, started, wait_until

SLOWLY = ("-n", "400", "--temperature", "0", "--weight-memory", "2MiB")
"""More than can be written before the test has done its part."""


def test_a_weight_cap_below_the_floor_names_one_that_works(demo: Path) -> None:
    done = flashinfer_with("generate", demo, "-p", PROMPT, "--weight-memory", "1kB")
    assert_failed(done, "weight-memory cap of 1000 B is below the floor", "raise the cap")
    floor = re.search(r"\((\d+) bytes\)", done.stderr)
    assert floor is not None
    again = flashinfer_with("generate", demo, "-p", PROMPT, "-n", "2", "--weight-memory", floor[1])
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("-p", PROMPT, "--memory", "1GiB", "--weight-memory", "1GiB"), ("--memory or --weight-memory, not both",)),
        (("-p", PROMPT, "--memory", "plenty"), ("plenty", "4GiB")),
        (("-p", PROMPT, "-n", "0"), ("'-n'", "1")),
        (("-p", PROMPT, "--context", "0"), ("--context", "1")),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_failed(flashinfer_with("generate", "no/matter", *arguments), *parts, "generate --help", status=2)


def test_prompts_that_cannot_be_used(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for arguments, part in (
        (("-p", ""), "the prompt is empty; give at least one word"),
        (("-f", str(tmp_path / "latin")), "is not UTF-8"),
        (("-f", str(tmp_path / "none")), "No such file"),
        ((), "the prompt is empty"),  # nothing on stdin
    ):
        assert_failed(flashinfer_with("generate", demo, *arguments), part)


def test_a_prompt_longer_than_the_context(demo: Path) -> None:
    done = flashinfer_with("generate", demo, "-p", "word " * 1000)
    assert_failed(done, "the prompt has", "the context of 512", "shorten the prompt")


def test_ctrl_c_while_generating_keeps_the_text_so_far(demo: Path, uncapped: str) -> None:
    process = started("generate", demo, "-p", PROMPT, *SLOWLY)
    assert process.stdout is not None
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert_interrupted(done)
    text = first.decode() + done.stdout
    assert text[: len(uncapped) - 1] == uncapped[:-1][: len(text)]


def test_ctrl_c_while_loading(demo: Path) -> None:
    process = started("generate", demo, "-p", PROMPT, *SLOWLY)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        process.kill()
        ended(process)
        pytest.skip("needs /proc to see what is being loaded")
    wait_until(lambda: "_kernels" in maps.read_text() or "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert_interrupted(done)
    assert done.stdout == ""


def test_a_reader_that_goes_away_ends_it_quietly(demo: Path) -> None:
    process = started("generate", demo, "-p", PROMPT, *SLOWLY)
    assert process.stdout is not None
    assert process.stdout.read(8)
    process.stdout.close()
    process.stdout = None
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_a_store_deleted_while_it_generates(demo: Path, uncapped: str, tmp_path: Path) -> None:
    """What is open stays readable, and all files of a store are opened at the start."""
    store = tmp_path / "store"
    shutil.copytree(demo, store)
    process = started("generate", store, "-p", PROMPT, "-n", "16", "--temperature", "0", "--weight-memory", "2MiB")
    assert process.stdout is not None
    first = process.stdout.read(8)
    shutil.rmtree(store)
    done = ended(process)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert first.decode() + done.stdout == uncapped
