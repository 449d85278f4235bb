"""Samples of what one feed-forward layer saw, on disk: its inputs, and who fired. Written once, read back in blocks.

A file is a header, one record for each sample and, once it is whole, an end mark with their number. A record is a
float32 scale, the input as float16 and the mask of the neurons that fired, eight to a byte. The scale is a power of two
that brings the largest value of the input to 2**14 .. 2**15: nothing overflows, whatever the model, and for most inputs
it changes no bit. The inputs lose as much as rounding to float16 does, which moves a decision product by 1e-3 of
itself; the mask is that of the true input.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreError
from flashinfer.store.files import writing
from flashinfer.units import MIB

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

MAGIC: Final = b"flashinfer-sample 1\n"
END: Final = b"flashinfer-samples end\n\0"
_HEADER: Final = struct.Struct("<20sII")
_END: Final = struct.Struct("<24sQ")
_DRAIN: Final = 1 * MIB
"""Bytes written after which they are pushed to the disk and dropped from the page cache."""
_PIECE: Final = 64
"""Neighbouring samples that are read together when samples are shuffled."""


@dataclass(frozen=True)
class Block:
    """Some samples. x: `[samples, hidden]`; active: who fired, `[samples, neurons]`."""

    x: Floats
    active: Mask


def sample_type(hidden: int, neurons: int) -> np.dtype[np.void]:
    """One record of the file."""
    return np.dtype([("scale", "<f4"), ("x", "<f2", (hidden,)), ("active", "u1", (-(-neurons // 8),))])


def pack_samples(x: Floats, active: Mask) -> Records:
    """Records of inputs `[samples, hidden]` and masks `[samples, neurons]`.

    Raises:
        ValueError: an input has a value that is no finite number.
    """
    peak = np.abs(x).max(axis=1, initial=0)
    if not np.isfinite(peak).all():
        raise ValueError("an input of a feed-forward layer has a value that is no finite number")
    # peak < 2**exponent; 2**-126 is the least scale that is no subnormal
    exponent = np.maximum(np.frexp(peak)[1] - 15, -126)
    scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
    records = np.empty(len(x), dtype=sample_type(x.shape[1], active.shape[1]))
    records["scale"] = scale
    records["x"] = x / scale[:, None]
    records["active"] = np.packbits(active, axis=1, bitorder="little")
    return records


def unpack_samples(records: Records, neurons: int) -> Block:
    """The inverse of `pack_samples`, but for the rounding of the inputs."""
    x = records["x"].astype(np.float32)
    x *= records["scale"][:, None]
    bits = np.unpackbits(np.ascontiguousarray(records["active"]), axis=1, count=neurons, bitorder="little")
    return Block(x, bits.view(np.bool_))


def chosen(first: int, count: int, total: int, wanted: int) -> Index:
    """Which of the `count` tokens from number `first` on are samples, when `wanted` of `total` shall be, evenly spread.

    The same for every layer, and however the text is cut into steps. Relative to `first`, sorted.
    """
    before = np.arange(first, first + count + 1, dtype=np.int64) * min(wanted, total) // max(1, total)
    return np.flatnonzero(np.diff(before))


class SampleWriter:
    """Makes a sample file at `path`, replacing what is there; a context manager.

    The file is whole when the block ends without an error, and synced to the disk; until then, and after an error, it
    lacks its end mark and nobody reads it. Holds up to 1 MiB of written bytes in the page cache.

    Raises:
        DiskFullError, StoreError: it cannot be written. Every method may raise them.
    """

    def __init__(self, path: Path, hidden: int, neurons: int) -> None:
        self.path, self.count = path, 0
        self._drained = self._position = 0
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            self._write(memoryview(_HEADER.pack(MAGIC, hidden, neurons)))

    def add(self, x: Floats, active: Mask) -> None:
        """Append inputs `[samples, hidden]` and masks `[samples, neurons]`. Raises ValueError as `pack_samples`."""
        if len(x):
            self._write(pack_samples(x, active).view(np.uint8).data)
            self.count += len(x)
        if self._position - self._drained >= _DRAIN:
            self._drain()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; the end mark is written only after all samples are on the disk, and only if there was no error."""
        fd = self._fd
        try:
            if error is None:
                self._drain()
                self._write(memoryview(_END.pack(END, self.count)))
                self._drain()
        finally:
            self._fd = -1
            os.close(fd)

    def _write(self, data: memoryview) -> None:
        self._position += len(data)
        with writing(self.path):
            while data:
                data = data[os.write(self._fd, data) :]

    def _drain(self) -> None:
        """Push what was written to the disk: only clean pages can be dropped from the cache."""
        with writing(self.path):
            os.fsync(self._fd)
        _forget(self._fd, self._drained, self._position - self._drained)
        self._drained = self._position


class Samples:
    """A whole sample file, open for reading; a context manager. What is read does not stay in the page cache.

    Attributes:
        hidden, neurons: of the layer. count: samples.

    Raises:
        StoreError: there is none at `path`, or it is not whole. Reading may raise it, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise StoreError(f"samples {path} cannot be read: {e.strerror}; calibrate again") from e
        try:
            self.hidden, self.neurons, self.count = self._measure()
        except BaseException:
            self.close()
            raise
        self._type = sample_type(self.hidden, self.neurons)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample, on disk and in the pool of `shuffled`."""
        return self._type.itemsize

    def read(self, start: int, stop: int) -> Block:
        """Samples `start` to `stop`."""
        return unpack_samples(self._records(start, stop), self.neurons)

    def blocks(self, span: range, size: int) -> Iterator[Block]:
        """The samples of a span in order, at most `size` at a time."""
        for start in range(span.start, span.stop, size):
            yield self.read(start, min(span.stop, start + size))

    def shuffled(self, span: range, size: int, rng: np.random.Generator, memory: int) -> Iterator[Block]:
        """The samples of a span in random order, `size` at a time, again and again without end.

        A pool of at most `memory` bytes (at least a batch and a run) is filled with runs of 64 samples from all over
        the span and dealt out in random order, so samples are mixed as far as memory goes. Each turn has its own order;
        what a turn leaves over of a batch begins the next one, so over time all samples count the same.

        Raises:
            ValueError: the span is empty.
        """
        if not span:
            raise ValueError("no samples to shuffle")
        pool = np.empty(max(memory // self.sample_bytes, size + _PIECE), dtype=self._type)
        held = 0
        while True:
            starts = range(span.start, span.stop, _PIECE)
            pieces = [range(starts[i], min(starts[i] + _PIECE, span.stop)) for i in rng.permutation(len(starts))]
            while pieces:
                while pieces and held + len(pieces[-1]) <= len(pool):
                    piece = pieces.pop()
                    pool[held : held + len(piece)] = self._records(piece.start, piece.stop)
                    held += len(piece)
                order, whole = rng.permutation(held), held - held % size
                for i in range(0, whole, size):
                    yield unpack_samples(pool[order[i : i + size]], self.neurons)
                pool[: held - whole] = pool[order[whole:]]
                held -= whole

    def _measure(self) -> tuple[int, int, int]:
        """Hidden size, neurons and samples. Raises StoreError unless the file is whole."""
        size = os.fstat(self._fd).st_size
        head, tail = (
            self._bytes(0, min(size, _HEADER.size)),
            self._bytes(max(0, size - _END.size), min(size, _END.size)),
        )
        if len(head) == _HEADER.size and len(tail) == _END.size:
            magic, hidden, neurons = _HEADER.unpack(head)
            mark, count = _END.unpack(tail)
            whole = _HEADER.size + count * sample_type(hidden, neurons).itemsize + _END.size == size
            if (magic, mark) == (MAGIC, END) and whole:
                return hidden, neurons, count
        raise StoreError(f"samples {self.path} are not whole: whoever wrote them was stopped; calibrate again")

    def _records(self, start: int, stop: int) -> Records:
        each = self._type.itemsize
        return np.frombuffer(self._bytes(_HEADER.size + start * each, (stop - start) * each), dtype=self._type)

    def _bytes(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        try:
            while at < size:
                got = os.preadv(self._fd, [view[at:]], offset + at)
                if not got:
                    raise StoreError(f"samples {self.path} were cut short while they were read; calibrate again")
                at += got
        except OSError as e:
            raise StoreError(f"samples {self.path} cannot be read: {e.strerror}; calibrate again") from e
        finally:
            view.release()
        _forget(self._fd, offset, size)
        return data

    def close(self) -> None:
        """Give the file back. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Seen(Protocol):
    """What a collector looks at of `model.observe.Seen`."""

    @property
    def x(self) -> Floats:
        """FFN inputs `[tokens, hidden]`."""
        ...

    @property
    def active(self) -> Mask:
        """Who fired, `[tokens, neurons]`."""
        ...


class Collector:
    """An observer (`model.observe`) that writes evenly spread tokens of a text, for each layer to a file of its own.

    Args:
        writers: one for each layer; the caller ends them.
        total: tokens of the text. wanted: samples to take of them.
    """

    def __init__(self, writers: Sequence[SampleWriter], total: int, wanted: int) -> None:
        self._writers, self._total, self._wanted = writers, total, wanted
        self._at = [0] * len(writers)

    def seen(self, layer: int, step: Seen) -> None:
        """Take the samples of one step. Raises as `SampleWriter.add`."""
        rows = chosen(self._at[layer], len(step.x), self._total, self._wanted)
        self._at[layer] += len(step.x)
        self._writers[layer].add(step.x[rows], step.active[rows])


def _forget(fd: int, offset: int, size: int) -> None:
    """Drop a range from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
