"""A Hugging Face directory written tensor by tensor and piece by piece: memory is one piece."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from flashinfer.quant import codec_named
from flashinfer.units import MIB

from .shapes import BOS, EOS, TORCH_NAMES, Shape

Floats = npt.NDArray[np.float32]

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
SHARD = 1024 * MIB
PIECE = 4 * MIB
"""Values converted at a time."""
PENDING = 3
"""Pieces that may wait for the disk."""


class Noise:
    """Normal random matrices: a pool drawn once and read from a place of its own for each tensor."""

    def __init__(self, seed: int) -> None:
        self._pool = np.random.default_rng(seed).standard_normal(4 * MIB + 1, dtype=np.float32)

    def rows(self, tensor: int, first: int, count: int, columns: int) -> Floats:
        """Rows `first` .. of that tensor's matrix of so many columns, a copy; variance 1."""
        at = tensor * 1_299_709 + first * columns
        out = np.empty(count * columns, dtype=np.float32)
        done = 0
        while done < len(out):
            start = (at + done) % len(self._pool)
            piece = self._pool[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out.reshape(count, columns)


@dataclass(frozen=True)
class _Place:
    fd: int
    offset: int
    shape: tuple[int, ...]


class CheckpointWriter:
    """The files of a checkpoint, laid out when opened and then filled in any order. Close it when done."""

    def __init__(self, out: Path, shape: Shape) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._codec, self._dtype = codec_named(shape.dtype), getattr(torch, TORCH_NAMES[shape.dtype])
        self._places: dict[str, _Place] = {}
        self._fds: list[int] = []
        self._thread, self._pending = ThreadPoolExecutor(1), deque[Future[None]]()
        self.index: dict[str, int] = {}
        """The number of each tensor: where its noise begins."""
        shards = _shards(shape)
        weight_map = {}
        for n, names in enumerate(shards):
            file = f"model-{n + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            self._lay_out(out / file, names, shape)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": shape.weight_bytes()}, "weight_map": weight_map}
            (out / "model.safetensors.index.json").write_text(json.dumps(index))
        (out / "config.json").write_text(json.dumps(shape.config(), indent=2))
        (out / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
        write_tokenizer(out, shape.vocab)

    def _lay_out(self, path: Path, names: dict[str, tuple[int, ...]], shape: Shape) -> None:
        end, table, width = 0, {}, self._codec.row_bytes(1)
        for name, dims in names.items():
            start, end = end, end + width * int(np.prod(dims))
            table[name] = {"dtype": DTYPES[shape.dtype], "shape": list(dims), "data_offsets": [start, end]}
        header = json.dumps(table).encode()
        header += b" " * (-len(header) % 8)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._fds.append(fd)
        os.pwrite(fd, len(header).to_bytes(8, "little") + header, 0)
        os.truncate(fd, 8 + len(header) + end)
        for name, dims in names.items():
            self.index[name] = len(self.index)
            self._places[name] = _Place(fd, 8 + len(header) + table[name]["data_offsets"][0], dims)

    def write(self, name: str, first: int, values: Floats) -> None:
        """Store rows `first` .. of a tensor (a vector is one row)."""
        place = self._places[name]
        columns = place.shape[-1]
        assert values.shape[-1] == columns, (name, values.shape)
        data = torch.from_numpy(values).to(self._dtype, copy=True).reshape(-1).view(torch.uint8)
        while len(self._pending) >= PENDING:
            self._pending.popleft().result()
        offset = place.offset + first * self._codec.row_bytes(columns)
        self._pending.append(self._thread.submit(_write_all, place.fd, memoryview(data.numpy()), offset))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Rows and columns of a matrix, the length of a vector."""
        return self._places[name].shape

    def close(self) -> None:
        """Finish what is being written and close the files. Idempotent."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._thread.shutdown()
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in files of about `SHARD` bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size, width = 0, codec_named(shape.dtype).row_bytes(1)
    for name, dims in shape.tensors().items():
        count = width * int(np.prod(dims))
        if shards[-1] and size + count > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size += count
    return shards


def pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges (first, count) of about `PIECE` values that cover a matrix."""
    step = max(1, PIECE // columns)
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]


def write_random(out: Path, shape: Shape, seed: int = 0) -> int:
    """A checkpoint of nothing but noise at a realistic scale; returns the bytes of its weights."""
    noise = Noise(seed)
    with CheckpointWriter(out, shape) as writer:
        for name, dims in shape.tensors().items():
            rows, columns = (1, *dims)[-2:]
            scale = np.float32(columns**-0.5 if len(dims) == 2 else 0.1)
            for first, count in pieces(rows, columns):
                values = noise.rows(writer.index[name], first, count, columns)
                values *= scale
                if name.endswith("norm.weight"):
                    values += 1
                writer.write(name, first, values)
    return shape.weight_bytes()


def write_tokenizer(out: Path, vocab: int, words: Sequence[str] = ()) -> None:
    """Byte-level, no merges: token n is byte n (in GPT-2's printable alphabet), 256 and 257 begin and end a text.

    The next are `words`, as they stand behind a space, as far as there is room; the rest of the vocabulary are words
    that no text is split into, which `text.token_ids` uses.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    tokens = {alphabet[b]: b for b in range(256)} | {"<s>": BOS, "</s>": EOS}
    tokens |= {f"{alphabet[32]}{word}": n for n, word in zip(range(len(tokens), vocab), words, strict=False)}
    tokens |= {f"{alphabet[32]}w{n}": n for n in range(len(tokens), vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], ignore_merges=bool(words)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(out / "tokenizer.json"))
