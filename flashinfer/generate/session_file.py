"""Conversations on disk: tokens, keys and values, and the sampler's state, bound to the store (and adapter) of theirs.

A file is `MAGIC`, the header's size (4 bytes, little-endian), the header (JSON), its XXH3-128 (16 bytes), then one
zstd frame of float32 keys and values per layer. It appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from flashinfer.errors import SessionError
from flashinfer.store import Manifest

Floats = npt.NDArray[np.float32]
Window = Sequence[Sequence[Sequence[int]]]
MAGIC = b"flashinfer-session 2\n"
_LARGEST_HEADER = 1 << 28


@dataclass(frozen=True)
class Conversation:
    """What a session file says. `tokens` are all so far; keys and values cover the first `length` of them.

    window: by layer, the records that the last tokens used. random: state of the sampler's generator. layers: reads
    each layer's keys and values, `[2, length, width]`.
    """

    tokens: tuple[int, ...]
    length: int
    window: Window
    random: dict[str, Any]
    layers: Callable[[], Iterator[Floats]]


def store_id(manifest: Manifest, adapter: str = "") -> str:
    """What a session file is bound to: the weights, wherever they lie, and the identity of the adapter, if any."""
    return "-".join(filter(None, (manifest.dense.xxh3, manifest.neurons.xxh3, adapter)))


def save_conversation(
    path: Path, store: str, tokens: tuple[int, ...], random: dict[str, Any], window: Window, layers: Iterable[Floats]
) -> None:
    """Write a session file over whatever is at `path`. `store` identifies the weight store.

    Raises:
        SessionError: it cannot be written; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    body = path.with_name(f".{path.name}.body-{os.getpid()}")
    try:
        frames, shape = _write_frames(body, layers)
        header = json.dumps(
            {"store": store, "tokens": tokens, "random": random, "window": window, "shape": shape, "frames": frames}
        )
        data = header.encode()
        with temporary.open("wb") as out, body.open("rb") as frames_in:
            out.write(MAGIC + len(data).to_bytes(4, "little") + data + xxhash.xxh3_128_digest(data))
            while piece := frames_in.read(1 << 20):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as e:
        raise SessionError(f"session {path} cannot be written: {e.strerror}; choose another place") from e
    finally:
        temporary.unlink(missing_ok=True)
        body.unlink(missing_ok=True)


def _write_frames(path: Path, layers: Iterable[Floats]) -> tuple[list[dict[str, Any]], list[int]]:
    frames, shape = [], [0, 0, 0]
    with path.open("wb") as out:
        for layer in layers:
            raw = np.ascontiguousarray(layer, dtype="<f4")
            packed = zstandard.compress(raw.data, 1)
            out.write(packed)
            frames.append({"bytes": len(packed), "xxh3": xxhash.xxh3_128_hexdigest(raw.data)})
            shape = list(raw.shape)
    return frames, shape


def load_conversation(path: Path, store: str) -> Conversation:
    """Read a session file's header; the layers are read when they are asked for.

    Raises:
        SessionError: no session file, truncated or altered, or of another store or adapter. So may reading the layers.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 4)
            size = int.from_bytes(start[len(MAGIC) :], "little")
            if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 4 or size > _LARGEST_HEADER:
                raise SessionError(f"{path} is not a session file of this version; start a new one")
            data, digest = file.read(size), file.read(16)
    except OSError as e:
        raise SessionError(f"session {path} cannot be read: {e.strerror}") from e
    if len(data) < size or xxhash.xxh3_128_digest(data) != digest:
        raise _damaged(path)
    header = json.loads(data)
    if header["store"] != store:
        raise SessionError(
            f"session {path} belongs to another weight store or adapter; give its own, or start a new session"
        )
    begin, shape = len(MAGIC) + 4 + size + 16, tuple(header["shape"])

    def layers() -> Iterator[Floats]:
        with path.open("rb") as file:
            file.seek(begin)
            for frame in header["frames"]:
                yield _read_frame(file.read(frame["bytes"]), frame["xxh3"], shape, path)

    return Conversation(tuple(header["tokens"]), shape[1], header["window"], header["random"], layers)


def _read_frame(packed: bytes, expected: str, shape: tuple[int, ...], path: Path) -> Floats:
    try:
        raw = zstandard.decompress(packed, max_output_size=4 * int(np.prod(shape)))
    except zstandard.ZstdError as e:
        raise _damaged(path) from e
    if xxhash.xxh3_128_hexdigest(raw) != expected:
        raise _damaged(path)
    return np.frombuffer(raw, dtype="<f4").reshape(shape)


def _damaged(path: Path) -> SessionError:
    return SessionError(f"session {path} is truncated or altered; start a new one")
