"""Recordings of which neurons a run needed, token by token: written while a model works, read back layer by layer.

`docs/recording.md` specifies the file. `Recorder` is an observer of `Model.observe`; `flashinfer bench cache` replays
what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from flashinfer import __version__
from flashinfer.errors import RecordingError
from flashinfer.store import Manifest
from flashinfer.units import KIB, MIB

if TYPE_CHECKING:
    from flashinfer.model.observe import Seen

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

KIND: Final = b"flashinfer-activations "
MAGIC: Final = KIND + b"1\n"
FRAME: Final = 64 * KIB
"""Bytes of parts after which a frame is closed: what a crash loses."""
LARGEST: Final = 256 * MIB
"""Bytes of a frame's content at most, and of the header."""
END: Final = 0xFFFFFFFF
"""In place of a layer: the end of the recording."""
_PART: Final = struct.Struct("<III")
_SIZE: Final = struct.Struct("<I")
_ESCAPE: Final = 255


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was recorded.

    neurons: how many each layer has. predictor: who named the recorded neurons; with `exact` they are those that fired.
    neuron_file: XXH3-128 of the store's neuron file, for people: another order of the neurons is the same model.
    """

    family: str
    activation: str
    hidden_size: int
    neurons: Annotated[tuple[Annotated[int, msgspec.Meta(gt=0)], ...], msgspec.Meta(min_length=1)]
    predictor: str
    neuron_file: str
    generator: str


def header_of(manifest: Manifest, predictor: str) -> Header:
    """The header of a recording of this store, with neurons named by that predictor."""
    f, neurons = manifest.facts, tuple(layer.neurons for layer in manifest.layers)
    generator = f"flashinfer-offload {__version__}"
    return Header(f.family, f.activation, f.hidden_size, neurons, predictor, manifest.neurons.xxh3, generator)


def gaps_of(mask: Mask) -> bytes:
    """A mask as the distances between its ones, row after row: a byte below 255 passes that many zeros and a one,
    255 passes 255 zeros."""
    zeros = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes, rest = np.divmod(zeros, _ESCAPE)
    ends = np.cumsum(escapes + 1)
    out = np.full(ends[-1] if len(ends) else 0, _ESCAPE, dtype=np.uint8)
    out[ends - 1] = rest
    return out.tobytes()


def ones_of(gaps: bytes) -> Index:
    """Where the ones are, sorted: the inverse of `gaps_of`."""
    codes = np.frombuffer(gaps, dtype=np.uint8)
    after = np.cumsum(codes + (codes != _ESCAPE), dtype=np.int64)
    found: Index = after[codes != _ESCAPE] - 1
    return found


class Recorder:
    """Writes a recording to a temporary file beside `path`, which becomes `path` on `close`; a context manager.

    It holds one frame in memory, some 64 KiB, and what one layer of one step adds. A step that was given up is left
    out by readers. What fails while writing ends the recording, not the run: `close` says it.

    Raises:
        RecordingError: there can be no file at `path`.
    """

    def __init__(self, path: Path, header: Header) -> None:
        if path.exists() and not path.is_file():
            raise RecordingError(f"recording {path} is not a file; give another name")
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._layers = len(header.neurons)
        self._error: OSError | None = None
        self._next = 0
        self._content = bytearray()
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise self._failed(e) from e
        data = msgspec.json.encode(header)
        self._start = MAGIC + _SIZE.pack(len(data)) + data + xxhash.xxh3_128_digest(data)
        self._size = 0

    def seen(self, layer: int, step: Seen) -> None:
        """Record one layer of one step. Layers come in order; the first begins a step, whatever became of the last."""
        if self._error is not None or self._fd < 0 or layer not in (0, self._next):
            return
        mask = step.active if step.needed is None else step.needed
        gaps = gaps_of(mask)
        self._content += _PART.pack(layer, len(mask), len(gaps)) + gaps
        self._next = (layer + 1) % self._layers
        if len(self._content) >= FRAME:
            try:
                self._write()
            except OSError as e:
                self._error = e

    def close(self) -> None:
        """Write what is left and give the file its name. Idempotent.

        Raises:
            RecordingError: it could not be written; nothing of it is left, and what was at its place still is.
        """
        if self._fd < 0:
            return
        try:
            if self._error is None:
                self._content += _PART.pack(END, 0, 0)
                self._write()
                os.fsync(self._fd)
                self._temporary.replace(self._path)
        except OSError as e:
            self._error = e
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._temporary.unlink(missing_ok=True)
        if self._error is not None:
            raise self._failed(self._error)

    def _write(self) -> None:
        """What there is so far, as a frame. A Ctrl-C on the way leaves them to be written again, to the same place."""
        frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(self._content)
        data = (b"" if self._size else self._start) + _SIZE.pack(len(frame)) + frame
        at = self._size
        while data:
            written = os.pwrite(self._fd, data, at)
            at, data = at + written, data[written:]
        self._size, self._content = at, bytearray()

    def _failed(self, error: OSError) -> RecordingError:
        return RecordingError(f"recording {self._path} cannot be written: {error.strerror or error}; give another name")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error that is on its way already is the one that is told."""
        with contextlib.suppress(RecordingError) if error is not None else contextlib.nullcontext():
            self.close()


@dataclass(frozen=True)
class Recording:
    """A recording on disk. partial: it is taken for as far as its frames are whole."""

    path: Path
    header: Header
    partial: bool
    _begin: int

    def layer(self, layer: int) -> Iterator[list[Index]]:
        """By step, the sorted needed neurons of each of its tokens, in one layer; the others are passed over.

        Raises:
            RecordingError: the file is damaged or, unless `partial`, cut short; what was given before is good.
        """
        layers, following, tokens, wanted = len(self.header.neurons), 0, 0, b""
        for at, count, gaps in self._parts():
            if at == 0:  # a new step, whatever became of the last
                following, tokens = 0, count
            if at != following or count != tokens:
                raise self._damaged()
            if at == layer:
                wanted = gaps
            following = (at + 1) % layers
            if following == 0:
                yield self._sets(wanted, tokens, self.header.neurons[layer])

    def _sets(self, gaps: bytes, tokens: int, neurons: int) -> list[Index]:
        ones = ones_of(gaps)
        if not tokens or (len(ones) and ones[-1] >= tokens * neurons):
            raise self._damaged()
        cuts = np.searchsorted(ones, np.arange(1, tokens) * neurons)
        return [part - i * neurons for i, part in enumerate(np.split(ones, cuts))]

    def _parts(self) -> Iterator[tuple[int, int, bytes]]:
        """Layer, tokens and gaps of every part, up to the end."""
        with self._reading() as file:
            file.seek(self._begin)
            while content := self._frame(file):
                at = 0
                while at < len(content):
                    layer, tokens, size = self._unpack(content[at : at + _PART.size])
                    at += _PART.size + size
                    if at > len(content) or (layer == END and (at < len(content) or file.read(1))):
                        raise self._damaged()
                    if layer == END:
                        return
                    yield layer, tokens, content[at - size : at]

    def _unpack(self, head: bytes) -> tuple[int, int, int]:
        if len(head) < _PART.size:
            raise self._damaged()
        layer, tokens, size = _PART.unpack(head)
        return layer, tokens, size

    def _frame(self, file: IO[bytes]) -> bytes:
        """The content of the next frame; empty where a partial recording ends."""
        start = file.read(_SIZE.size)
        size = _SIZE.unpack(start)[0] if len(start) == _SIZE.size else 1
        frame = file.read(size)
        try:
            if len(frame) == size and 0 < zstandard.frame_content_size(frame) <= LARGEST:
                return zstandard.decompress(frame)
        except zstandard.ZstdError:
            pass
        if self.partial:
            return b""
        if len(frame) < size:
            raise RecordingError(
                f"recording {self.path} is cut short: the run that writes it goes on, or was killed; "
                "record again, or take what is whole with --partial"
            )
        raise self._damaged()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[IO[bytes]]:
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as e:
            raise _unreadable(self.path, e) from e

    def _damaged(self) -> RecordingError:
        return RecordingError(f"recording {self.path} is damaged; record again, or take what is whole with --partial")


def open_recording(path: Path, *, partial: bool = False) -> Recording:
    """Read a recording's header; the steps are read when they are asked for.

    Raises:
        RecordingError: no recording, one of a newer version, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if not magic.startswith(KIND):
                raise RecordingError(
                    f"{path} is not a recording of activations; make one with `generate --record-activations FILE`"
                )
            if magic != MAGIC:
                raise RecordingError(f"recording {path} is of another version than 1; use the program that wrote it")
            start = file.read(_SIZE.size)
            size = _SIZE.unpack(start)[0] if len(start) == _SIZE.size else 0
            data, digest = (file.read(size), file.read(16)) if size <= LARGEST else (b"", b"")
            begin = file.tell()
    except OSError as e:
        raise _unreadable(path, e) from e
    if xxhash.xxh3_128_digest(data) != digest:
        raise RecordingError(f"the header of recording {path} is damaged; record again")
    try:
        header = msgspec.json.decode(data, type=Header)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise RecordingError(f"the header of recording {path} is wrong: {e}; record again") from e
    return Recording(path, header, partial, begin)


def _unreadable(path: Path, error: OSError) -> RecordingError:
    return RecordingError(f"recording {path} cannot be read: {error.strerror or error}")
