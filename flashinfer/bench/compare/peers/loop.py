"""What somebody would write in an afternoon: every layer streamed from the checkpoint for every token.

Direct reads of READ bytes, IN_FLIGHT of them by threads, fill a ring of buffers while earlier ones are multiplied
with. f16 weights times f16 activations by torch; norms, rotary, attention and the residual in f32. Nothing is kept
but norms and keys and values; rows of the embedding are read when wanted. Llama-shaped models only.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .halves import sources

READ = 1 << 20
IN_FLIGHT = 8
BUFFER = 24 << 20
BUFFERS = 3
PAGE = 4096
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True)
class Matrix:
    """Where an f16 matrix lies."""

    fd: int
    offset: int
    rows: int
    columns: int


class Checkpoint:
    """The safetensors files of a directory, opened for direct reads."""

    def __init__(self, root: Path) -> None:
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, Tensor] = {}
        opened: dict[Path, int] = {}
        for name, source in sources(root).items():
            if source.file not in opened:
                opened[source.file] = os.open(source.file, os.O_RDONLY | os.O_DIRECT)
            if len(source.shape) == 2:
                self.matrices[name] = Matrix(opened[source.file], source.offset, *source.shape)
            else:
                self.vectors[name] = torch.from_numpy(source.read()).float()


class Stream:
    """Blocks of rows of matrices in the order of use, read ahead without end."""

    def __init__(self, order: Sequence[Matrix]) -> None:
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self._wanted = self._blocks(order)
        self._free = deque(mmap.mmap(-1, BUFFER + 2 * PAGE) for _ in range(BUFFERS))
        self._reading: deque[tuple[Matrix, int, int, mmap.mmap, list[Future[None]]]] = deque()

    @staticmethod
    def _blocks(order: Sequence[Matrix]) -> Iterator[tuple[Matrix, int, int]]:
        while True:
            for m in order:
                step = BUFFER // (2 * m.columns)
                for first in range(0, m.rows, step):
                    yield m, first, min(step, m.rows - first)

    def product(self, x: Tensor, out: Tensor, matrix: Matrix) -> None:
        """`x @ matrix.T`; matrices must be asked for in the order given."""
        done = 0
        while done < matrix.rows:
            while self._free:
                self._start(self._free.popleft())
            m, first, rows, buffer, reads = self._reading.popleft()
            assert (m, first) == (matrix, done)
            for read in reads:
                read.result()
            start = (m.offset + 2 * first * m.columns) % PAGE
            w = torch.frombuffer(buffer, dtype=torch.float16, count=rows * m.columns, offset=start).view(rows, -1)
            for row, target in zip(x, out, strict=True):
                target[first : first + rows] = torch.mv(w, row)
            del w
            self._free.append(buffer)
            done += rows

    def _start(self, buffer: mmap.mmap) -> None:
        m, first, rows = next(self._wanted)
        start = m.offset + 2 * first * m.columns
        low = start - start % PAGE
        high = -(-(start + 2 * rows * m.columns) // PAGE) * PAGE
        reads = [
            self._pool.submit(_read, m.fd, buffer, at - low, min(READ, high - at), at) for at in range(low, high, READ)
        ]
        self._reading.append((m, first, rows, buffer, reads))


def _read(fd: int, buffer: mmap.mmap, target: int, length: int, offset: int) -> None:
    """Short only where the file ends: what is wanted lies before that."""
    with memoryview(buffer) as view, view[target : target + length] as part:
        if os.preadv(fd, [part], offset) <= 0:
            raise OSError("the checkpoint ends too early")


class Loop:
    """A llama-shaped model; `step` appends tokens and gives the logits after the last of them."""

    def __init__(self, root: Path, context: int) -> None:
        self.files = Checkpoint(root)
        c = self.files.config
        self.layers, self.heads, self.hidden = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"]
        self.kv_heads = c.get("num_key_value_heads") or self.heads
        self.dim, self.eps = self.hidden // self.heads, c["rms_norm_eps"]
        self.act = {"silu": torch.nn.functional.silu, "relu": torch.relu}[c["hidden_act"]]
        angles = torch.outer(torch.arange(context), c["rope_theta"] ** (-torch.arange(0, self.dim, 2) / self.dim))
        self.cos, self.sin = angles.cos(), angles.sin()
        self.kv = torch.empty(self.layers, 2, context, self.kv_heads, self.dim)
        self.length = 0
        self.head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
        parts = [f"self_attn.{p}_proj" for p in ATTENTION] + [f"mlp.{p}_proj" for p in FEED_FORWARD]
        order = [f"model.layers.{i}.{part}" for i in range(self.layers) for part in parts]
        self.stream = Stream([self._matrix(name) for name in (*order, self.head)])

    def _matrix(self, name: str) -> Matrix:
        return self.files.matrices[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        m = self._matrix(name)
        out = torch.empty(len(x), m.rows, dtype=torch.float16)
        self.stream.product(x.half(), out, m)
        return out.float()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.files.vectors[f"{name}.weight"]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        m = self._matrix("model.embed_tokens")
        rows = []
        with mmap.mmap(-1, 2 * m.columns + 2 * PAGE) as buffer:
            for token in tokens:
                start = m.offset + 2 * token * m.columns
                low = start - start % PAGE
                length = -(-(start + 2 * m.columns - low) // PAGE) * PAGE
                _read(m.fd, buffer, 0, length, low)
                row = bytearray(buffer[start - low : start - low + 2 * m.columns])
                rows.append(torch.frombuffer(row, dtype=torch.float16).float())
        return torch.stack(rows)

    def _rotate(self, x: Tensor, at: slice) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[at, None], self.sin[at, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _attention(self, layer: int, x: Tensor, at: slice) -> Tensor:
        name = f"model.layers.{layer}.self_attn"
        q, k, v = (self._linear(x, f"{name}.{p}_proj").view(len(x), -1, self.dim) for p in "qkv")
        self.kv[layer, 0, at], self.kv[layer, 1, at] = self._rotate(k, at), v
        keys, values = (t[: at.stop].repeat_interleave(self.heads // self.kv_heads, 1) for t in self.kv[layer])
        scores = torch.einsum("qhd,khd->hqk", self._rotate(q, at), keys) * self.dim**-0.5
        later = torch.arange(at.stop)[None] > torch.arange(at.start, at.stop)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1)
        return self._linear(mixed, f"{name}.o_proj")

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.mlp"
        gate = self.act(self._linear(x, f"{name}.gate_proj"))
        return self._linear(gate * self._linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits after the last of the tokens."""
        at = slice(self.length, self.length + len(tokens))
        x = self._embed(tokens)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            x = x + self._attention(layer, self._norm(x, f"{name}.input_layernorm"), at)
            x = x + self._ffn(layer, self._norm(x, f"{name}.post_attention_layernorm"))
        self.length = at.stop
        return self._linear(self._norm(x[-1:], "model.norm"), self.head)[0]
