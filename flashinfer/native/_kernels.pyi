"""The CPU kernels. Arrays are C-contiguous; nothing is converted or copied. Every function that computes releases the
GIL. Shapes that do not fit raise ValueError, types that do not TypeError."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]
_Index = npt.NDArray[np.int64]

def available() -> list[str]:
    """The instruction sets this build and this processor have, the best first; "portable" always."""

class Codec:
    """How weights are coded."""

    def __init__(self, type: int) -> None:
        """0: f32, 1: f16, 2: bf16, 3: int8g32."""
    @staticmethod
    def codes(
        bits: int,
        group: int,
        table: Sequence[float],
        scale: int,
        unit: float,
        zero: int,
        map: Sequence[float],
        outliers: Sequence[int],
    ) -> Codec:
        """Rows as `quant.layout.Layout` says. group: a power of two, 32 at least; 0: the row. scale: 0: f16, 1: f32,
        2: e8m0, 3: nested, whose map is `map`. outliers: of `llm.int8`. ValueError for what no kernel knows."""
    @property
    def integers(self) -> bool:
        """Whether products are of integers."""

class Engine:
    """Kernels of one instruction set and a pool of threads, the caller's among them."""

    def __init__(self, threads: int, instructions: str = "") -> None:
        """ValueError for an instruction set that is not available; empty means the best one."""
    @property
    def name(self) -> str:
        """The instruction set."""
    @property
    def scratch_bytes(self) -> int:
        """Bytes of activations and pointers kept between calls."""
    def linear(self, out: _Floats, first: int, x: _Floats, weights: _Bytes, codec: Codec, rows: int, cols: int) -> None:
        """`out[:, first : first + rows] = x @ weights.T`."""
    def decide(
        self,
        out: _Floats,
        x: _Floats,
        index: _Index,
        memory: _Bytes,
        offsets: _Index,
        bundle: int,
        rows: Codec | None,
        rows_at: int,
        bias: Codec | None,
        bias_at: int,
    ) -> None:
        """See `Backend.decide`. A bundle has `bundle` bytes; its parts are (codec, byte offset), below 0: none. Every
        offset must lie in the memory, those whose index is negative, too."""
    def ffn(
        self,
        acc: _Floats,
        x: _Floats,
        fired: _Floats,
        memory: _Bytes,
        offsets: _Index,
        bundle: int,
        up: Codec | None,
        up_at: int,
        bias: Codec | None,
        bias_at: int,
        down: Codec | None,
        down_at: int,
        up_activation: int,
    ) -> None:
        """See `Backend.ffn`. A bundle has `bundle` bytes; its parts are (codec, byte offset), below 0: none."""
    def append(self, cache: npt.NDArray[Any], at: int, x: _Floats, skip: int, count: int) -> None:
        """Positions at .. at+count of `cache` become rows skip .. skip+count of x: `[kv heads, positions, dim]` in
        float32, or float16 seen as uint16, or uint8 `[kv heads, positions, bytes]`: rows of `int8g32`."""
    def attend(
        self,
        out: _Floats,
        q: _Floats,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
        first: int,
        heads: int,
        window: int,
        cap: float,
        slopes: _Floats | None,
        sinks: _Floats | None,
    ) -> None:
        """Causal attention; k, v as `append` wrote them. window: positions a query sees, 1 at least. cap: 0 is none.
        The rest is that of `backend.base.Scoring`."""
    def norm(
        self, out: _Floats, x: _Floats, weight: _Floats | None, bias: _Floats | None, center: bool, eps: float
    ) -> None:
        """RMSNorm; LayerNorm with `center`."""
    def rotate(self, out: _Floats, x: _Floats, dim: int, cos: _Floats, sin: _Floats) -> None:
        """Rotary positions on heads of `dim` values, halves convention."""
    def fire(self, out: _Floats, gate: _Floats, activation: int, threshold: float, index: _Index) -> None:
        """`out[tile, t, n] = activation(gate[t, index[tile, n]])`, 0 where the index is negative."""
    def copy(self, memory: _Bytes, targets: _Index, sources: _Index, size: int) -> None:
        """`memory[targets[i] : targets[i] + size] = memory[sources[i] : ...]`; no two of these ranges overlap."""
    def close(self) -> None:
        """End the threads. Idempotent; a later call starts them again."""
