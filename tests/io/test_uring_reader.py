"""The io_uring reader, direct and buffered, with faults put in below Python."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from flashinfer.config import IoConfig
from flashinfer.errors import PlatformError, StoreError, StoreReadError
from flashinfer.io import AlignedBuffer, Extents, Reader, ThreadReader, UringReader, open_reader, uring
from flashinfer.io.files import OpenFile
from tests.io.reader_conformance import FILE_BYTES, ReaderConformance, assert_reads, contents, extents

pytest.importorskip("flashinfer.native._ring", reason="the native core is not built")
WHY_NOT = uring.why_not(Path(__file__))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no io_uring here: {WHY_NOT}")
needs_fork = pytest.mark.filterwarnings("ignore:This process")


def write(folder: Path, blobs: tuple[bytes, ...]) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(len(blobs))]
    for path, blob in zip(paths, blobs, strict=True):
        path.write_bytes(blob)
    return paths


def fault(reader: Reader, offset: int, result: int, times: int = 1, file: int = 0) -> None:
    cast(UringReader, reader)._ring.fault(file, offset, result, times)


class UringConformance(ReaderConformance):
    direct = True

    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Reader]:
        self.paths = write(tmp_path, self.blobs)
        reader = UringReader(self.paths, depth=8, direct=self.direct)
        yield reader
        reader.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        fault(reader, offset, -errno.EIO, times=-1)

    def test_partial_reads_are_continued_from_a_whole_unit(self, reader: Reader) -> None:
        fault(reader, -1, 6000, times=-1)
        assert_reads(reader, self.blobs[0], extents((8192, 65536, 0), (0, 4096, 65536)))

    @pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
    def test_what_may_pass_is_tried_again(self, reader: Reader, error: int) -> None:
        fault(reader, -1, -error, times=30)
        wanted = extents(*((4096 * i, 4096, 4096 * i) for i in range(16)))
        assert_reads(reader, self.blobs[0], wanted)
        assert (reader.stats.reads, reader.stats.bytes) == (16, 16 * 4096)

    def test_what_does_not_pass_is_an_error(self, reader: Reader) -> None:
        fault(reader, 4096, -errno.EAGAIN, times=-1)
        with AlignedBuffer(4096) as buffer, pytest.raises(StoreReadError, match="temporarily"):
            reader.submit(0, extents((4096, 4096, 0)), buffer.array).wait()

    def test_nothing_at_all_is_a_file_too_short(self, reader: Reader) -> None:
        fault(reader, 4096, 100)
        with AlignedBuffer(4096) as buffer, pytest.raises(StoreReadError, match="shorter"):
            reader.submit(0, extents((4096, 4096, 0)), buffer.array).wait()

    def test_an_error_in_a_continued_read_names_the_whole(self, reader: Reader) -> None:
        fault(reader, 8192, 4096)
        fault(reader, 12288, -errno.EIO)
        with AlignedBuffer(16384) as buffer, pytest.raises(StoreReadError, match="Input/output") as caught:
            reader.submit(0, extents((8192, 16384, 0)), buffer.array).wait()
        assert (caught.value.path, caught.value.offset, caught.value.length) == (str(self.paths[0]), 8192, 16384)

    def test_only_the_batch_that_failed_fails(self, reader: Reader) -> None:
        """Three batches wait in line for eight places; the second fails at its first read."""
        fault(reader, 64 * 4096 // 2, -errno.EIO)
        with AlignedBuffer(FILE_BYTES) as buffer:
            cuts = [(0, 20), (32, 52), (52, 64)]
            batches = [extents(*((4096 * i, 4096, 4096 * i) for i in range(*cut))) for cut in cuts]
            pending = [reader.submit(0, batch, buffer.array) for batch in batches]
            pending[2].wait()
            with pytest.raises(StoreReadError):
                pending[1].wait()
            pending[0].wait()
            for low, high in (cuts[0], cuts[2]):
                part = slice(4096 * low, 4096 * high)
                assert buffer.array[part].tobytes() == self.blobs[0][part]

    def test_the_buffer_is_free_once_waited_for(self, reader: Reader) -> None:
        target = AlignedBuffer(FILE_BYTES)
        reader.submit(0, extents((0, FILE_BYTES, 0)), target.array).wait()
        memory = target._map
        assert memory is not None
        target.close()
        assert memory.closed

    def test_the_buffer_outlives_a_read_nobody_waits_for(self, reader: Reader) -> None:
        target = AlignedBuffer(FILE_BYTES)
        alive = weakref.ref(target.array)
        reader.submit(0, extents(*((4096 * i, 4096, 4096 * i) for i in range(64))), target.array)
        target.close()
        assert alive() is not None
        assert_reads(reader, self.blobs[1], extents((4096, 8192, 0)), 1)
        reader.close()
        assert alive() is None

    def test_a_refused_batch_keeps_nothing(self, reader: Reader) -> None:
        target = AlignedBuffer(8192)
        alive = weakref.ref(target.array)
        ring = cast(UringReader, reader)._ring
        offset, length, place = (np.array([n]) for n in (0, 8192, 4096))
        with pytest.raises(ValueError, match="beyond the target"):
            ring.submit(0, offset, length, place, target.array)
        with pytest.raises(IndexError):
            reader.submit(2, extents((0, 4096, 0)), target.array)
        target.close()
        assert alive() is None

    def test_threads_share_a_reader(self, reader: Reader) -> None:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(50):
                    offsets = rng.permutation(FILE_BYTES // 4096)[: int(rng.integers(1, 40))] * 4096
                    places = np.arange(len(offsets)) * 4096
                    wanted = Extents(offsets, np.full(len(offsets), 4096), places)
                    assert_reads(reader, self.blobs[seed % 2], wanted, seed % 2)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_the_thread_that_submitted_may_be_gone(self, reader: Reader) -> None:
        with AlignedBuffer(FILE_BYTES) as buffer:
            pending = []
            wanted = extents(*((4096 * i, 4096, 4096 * i) for i in range(64)))
            thread = threading.Thread(target=lambda: pending.append(reader.submit(0, wanted, buffer.array)))
            thread.start()
            thread.join()
            pending[0].wait()
            assert buffer.array.tobytes() == self.blobs[0]

    @needs_fork
    def test_a_child_is_refused_and_does_not_disturb_the_parent(self, reader: Reader) -> None:
        with AlignedBuffer(4096) as buffer:
            wanted = extents((0, 4096, 0))
            pending = reader.submit(0, wanted, buffer.array)
            child = os.fork()
            if not child:
                code = 0
                for action in (lambda: reader.submit(0, wanted, buffer.array), pending.wait):
                    try:
                        action()
                        code = 1
                    except ValueError as error:
                        code = code or ("fork" not in str(error))
                reader.close()
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            pending.wait()
            assert buffer.array.tobytes() == self.blobs[0][:4096]


class TestDirect(UringConformance):
    def test_direct(self, reader: Reader) -> None:
        assert reader.direct
        assert reader.note.startswith("io_uring, up to 8 reads in flight, direct reads (O_DIRECT) in units of ")
        assert reader.alignment in (512, 4096)


class TestBuffered(UringConformance):
    direct = False

    def test_buffered(self, reader: Reader) -> None:
        assert not reader.direct
        assert "not asked for" in reader.note


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[UringReader, Callable[[], None], bytes]]:
    """A reader whose file 1 answers only when told to (it is a pipe): reads of it end with 4096 times `x`."""
    blob = contents(7)
    path = write(tmp_path, (blob,))[0]
    out, into = os.pipe()
    plain = OpenFile(str(path), os.open(path, os.O_RDONLY), 4096, None)
    monkeypatch.setattr(uring, "open_files", lambda *_, **__: [plain, OpenFile("pipe", out, 4096, None)])
    reader = UringReader([path, path], depth=4)
    yield reader, lambda: cast(None, os.write(into, b"x" * 4096)), blob
    os.close(into)  # whatever is still stuck ends too early
    reader.close()


def test_a_wait_does_not_hold_up_another_threads(
    stuck: tuple[UringReader, Callable[[], None], bytes],
) -> None:
    """One thread sleeps in the kernel for a batch that does not come; the other's come nevertheless, and go on."""
    reader, answer, blob = stuck
    with AlignedBuffer(8192) as slow:
        pending = reader.submit(1, extents((0, 4096, 0)), slow.array)
        sleeper = threading.Thread(target=pending.wait)
        sleeper.start()
        for _ in range(20):
            wanted = extents(*((4096 * i, 4096, 4096 * i) for i in range(20)))
            assert_reads(reader, blob, wanted)
        assert sleeper.is_alive()
        answer()
        sleeper.join(10)
        assert not sleeper.is_alive()
        assert slow.array[:4096].tobytes() == b"x" * 4096


@pytest.mark.parametrize("leads", [True, False])
def test_an_interrupt_during_wait_leaves_the_reader_usable(
    stuck: tuple[UringReader, Callable[[], None], bytes], leads: bool
) -> None:
    """Whether this thread sleeps in the kernel or for another one that does."""
    reader, answer, blob = stuck
    with AlignedBuffer(8192) as buffer:
        other = reader.submit(1, extents((0, 4096, 4096)), buffer.array)
        pending = reader.submit(1, extents((0, 4096, 0)), buffer.array)
        leader = threading.Thread(target=other.wait)
        if not leads:
            leader.start()
        timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
        finally:
            timer.join()
            signal.signal(signal.SIGINT, previous)
        assert_reads(reader, blob, extents((4096, 4096, 0)))
        answer()
        answer()
        pending.wait()
        if not leads:
            leader.join()
        other.wait()
        assert buffer.array.tobytes() == b"x" * 8192


def test_all_reads_end_before_an_error_is_raised(stuck: tuple[UringReader, Callable[[], None], bytes]) -> None:
    """The first of two reads has failed for long; the second is still under way, and waited for."""
    reader, answer, _ = stuck
    fault(reader, 4096, -errno.EIO, file=1)
    with AlignedBuffer(8192) as buffer:
        pending = reader.submit(1, extents((4096, 4096, 0), (0, 4096, 4096)), buffer.array)
        answer()
        answered = threading.Event()

        def answer_late() -> None:
            answered.set()
            answer()

        timer = threading.Timer(0.1, answer_late)
        timer.start()
        with pytest.raises(StoreReadError):
            pending.wait()
        assert answered.is_set()
        timer.join()


def test_a_reader_nobody_holds_leaves_nothing_behind(tmp_path: Path) -> None:
    paths = write(tmp_path, (contents(1),))

    def held() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    reader = UringReader(paths, depth=4)
    with AlignedBuffer(FILE_BYTES) as buffer:
        pending = reader.submit(0, extents(*((4096 * i, 4096, 4096 * i) for i in range(64))), buffer.array)
        assert held() == before + 2
        del reader
        assert held() == before
        pending.wait()
        assert buffer.array.tobytes() == contents(1)


def test_a_missing_file_is_a_store_error_and_closes_the_others(tmp_path: Path) -> None:
    present = write(tmp_path, (contents(1),))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match=r"cannot open .*absent"):
        UringReader([*present, tmp_path / "absent"], depth=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("depth", [0, 5000])
def test_the_depth_has_bounds(tmp_path: Path, depth: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="in flight"):
        UringReader(write(tmp_path, (b"x",)), depth=depth)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_files_of_different_units_can_be_opened(tmp_path: Path) -> None:
    """One that is too short for a direct read of 512 bytes away from its start is read in pages."""
    paths = [tmp_path / "long", tmp_path / "short"]
    for path, size in zip(paths, (8192, 600), strict=True):
        path.write_bytes(bytes(size))
    for order in (paths, paths[::-1]):
        with closing(UringReader(order, depth=4)) as reader:
            assert reader.alignment >= 512


def test_an_empty_file_can_be_opened(tmp_path: Path) -> None:
    UringReader(write(tmp_path, (b"",)), depth=1).close()


def test_no_files(tmp_path: Path) -> None:
    UringReader([], depth=1).close()


def test_open_reader_follows_the_config(tmp_path: Path) -> None:
    paths = write(tmp_path, (contents(1),))
    kinds: list[tuple[IoConfig, type]] = [
        (IoConfig(depth=3), UringReader),
        (IoConfig(reader="io_uring", depth=3), UringReader),
        (IoConfig(reader="threads", threads=3), ThreadReader),
    ]
    for config, kind in kinds:
        reader = open_reader(paths, config)
        assert isinstance(reader, kind)
        assert "3 " in reader.note
        assert_reads(reader, contents(1), extents((4096, 4096, 0)))
        reader.close()


def test_a_trial_read_that_fails_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that makes a ring and does not know the request."""

    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    paths = write(tmp_path, (contents(1),))
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(uring, "_try", refused)
    assert uring.why_not(paths[0]) == "the kernel refused it: Invalid argument"
    with pytest.raises(PlatformError, match="no io_uring here: the kernel refused it: Invalid argument"):
        open_reader(paths, IoConfig(reader="io_uring"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    reader = open_reader(paths, IoConfig())
    assert isinstance(reader, ThreadReader)
    assert reader.note.endswith("not with io_uring: the kernel refused it: Invalid argument")
    assert_reads(reader, contents(1), extents((4096, 4096, 0)))
    reader.close()


def test_without_the_native_core_it_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer.native._ring", None)
    monkeypatch.delattr("flashinfer.native._ring", raising=False)
    reader = open_reader(write(tmp_path, (contents(1),)), IoConfig())
    assert reader.note.endswith("not with io_uring: the native core is not built")
    reader.close()


def elsewhere(path: Path, prepare: str) -> str:
    """The note of a reader opened in a process so prepared, which has read the file with it."""
    code = f"""
        import ctypes, resource, struct, sys
        from pathlib import Path
        import numpy as np
        from flashinfer.config import IoConfig
        from flashinfer.io import AlignedBuffer, Extents, open_reader
        {prepare}
        path = Path(sys.argv[1])
        reader = open_reader([path], IoConfig())
        offsets = np.arange(64) * 4096
        with AlignedBuffer(64 * 4096) as buffer:
            reader.submit(0, Extents(offsets, np.full(64, 4096), offsets), buffer.array).wait()
            assert buffer.array.tobytes() == path.read_bytes()
        print(reader.note)
        reader.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_little_locked_memory_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path, (contents(1),))[0]
    note = elsewhere(path, "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))")
    assert note.startswith("io_uring")


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_where_the_kernel_forbids_it_threads_read_and_say_so(tmp_path: Path, error: int) -> None:
    """With a real filter of system calls, as containers have it: io_uring_setup (425) fails, all else passes."""
    # seccomp's BPF: load the number; is it 425? then fail with errno; else allow
    steps = f"[(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, {0x00050000 | error}), (0x06, 0, 0, 0x7FFF0000)]"
    prepare = (
        f"code = b''.join(struct.pack('HBBI', *step) for step in {steps}); "
        "text = ctypes.create_string_buffer(code, len(code)); "
        "filter = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(text))); "
        "prctl = ctypes.CDLL(None, use_errno=True).prctl; "
        "prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]; "
        "assert prctl(38, 1, None, 0, 0) == 0; assert prctl(22, 2, filter, 0, 0) == 0"
    )
    note = elsewhere(write(tmp_path, (contents(1),))[0], prepare)
    assert note.startswith("16 threads, ")
    assert note.endswith(f"not with io_uring: the kernel refused it: {os.strerror(error)}")
