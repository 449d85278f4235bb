"""After fork(): the thread reader (for the other see `test_uring_reader`). After Ctrl-C with reads in flight: both."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.io import AlignedBuffer, Extents, Reader, ThreadReader, UringReader, uring
from flashinfer.io.files import OpenFile
from tests.io.reader_conformance import assert_reads, contents, extents

needs_fork = pytest.mark.filterwarnings("ignore:This process")
PATIENCE = 10


def in_child(*actions: Callable[[], object]) -> list[str]:
    """What each action raises in the child of a fork; the child is killed where it hangs."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        said = []
        for action in actions:
            try:
                action()
                said.append("nothing")
            except ValueError as error:
                said.append(str(error))
        os.write(into, "\n".join(said).encode())
        os._exit(0)
    os.close(into)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read().decode()
    assert status == 0, f"the child ended with {status} and said {text!r}"
    return text.split("\n")


@needs_fork
def test_a_child_is_refused_and_does_not_disturb_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gate, plain = tmp_path / "f", threading.Event(), os.preadv
    path.write_bytes(contents(1))
    reader = ThreadReader([path], threads=2)
    files = len(list(Path("/dev/fd").iterdir()))

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        gate.wait(PATIENCE)
        return plain(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    wanted = extents((0, 4096, 0))
    with AlignedBuffer(4096) as buffer:
        pending = reader.submit(0, wanted, buffer.array)  # in flight while the process forks
        submit, wait, close = in_child(lambda: reader.submit(0, wanted, buffer.array), pending.wait, reader.close)
        assert "fork" in submit
        assert "fork" in wait
        assert close == "nothing"
        gate.set()
        pending.wait()
        assert buffer.array.tobytes() == contents(1)[:4096]
    assert_reads(reader, contents(1), extents((4096, 8192, 0)))
    assert len(list(Path("/dev/fd").iterdir())) == files
    reader.close()


@needs_fork
def test_a_child_opens_files_of_its_own(tmp_path: Path) -> None:
    """Whatever the parent's reader does, one that is made in the child works there."""
    path = tmp_path / "f"
    path.write_bytes(contents(1))
    parents = ThreadReader([path], threads=2)

    def read() -> None:
        reader = ThreadReader([path], threads=2)
        assert_reads(reader, contents(1), extents((4096, 8192, 0)))
        reader.close()

    assert in_child(read) == ["nothing"]
    parents.close()


def interrupted(pending_wait: Callable[[], None]) -> None:
    """Ctrl-C a moment after the wait has begun."""
    timer = threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pending_wait()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, previous)


def abandon(reader: Reader, file: int, wanted: Extents) -> weakref.ref[object]:
    """Read, be interrupted, and let go of the buffer and of all that is under way; only a weak reference stays."""
    buffer = AlignedBuffer(4096)
    alive = weakref.ref(buffer.array)
    pending = reader.submit(file, wanted, buffer.array)
    interrupted(pending.wait)
    buffer.close()
    return alive


def test_after_ctrl_c_the_ring_keeps_the_buffer_until_the_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(contents(1))
    if (why := uring.why_not(path)) is not None:
        pytest.skip(f"no io_uring here: {why}")
    out, into = os.pipe()
    plain = OpenFile(str(path), os.open(path, os.O_RDONLY), 4096, None)
    monkeypatch.setattr(uring, "open_files", lambda *_, **__: [plain, OpenFile("pipe", out, 4096, None)])
    reader = UringReader([path, path], depth=2)
    alive = abandon(reader, 1, extents((0, 4096, 0)))
    gc.collect()
    assert alive() is not None
    os.write(into, b"x" * 4096)
    reader.close()
    assert alive() is None
    os.close(into)


def test_after_ctrl_c_the_threads_keep_the_buffer_until_the_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, gate, plain = tmp_path / "f", threading.Event(), os.preadv
    path.write_bytes(contents(1))
    reader = ThreadReader([path], threads=1)

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        gate.wait(PATIENCE)
        return plain(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    alive = abandon(reader, 0, extents((0, 4096, 0)))
    gc.collect()
    assert alive() is not None
    gate.set()
    reader.close()
    gc.collect()
    assert alive() is None
