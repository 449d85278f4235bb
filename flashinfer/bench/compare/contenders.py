"""Who can be compared: rungs of the ladder, our other predictors, and other programs. Tables only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashinfer.config import BackendName, ReaderName
from flashinfer.memory import Mode

NAIVE, LLAMA, IN_RAM = "naive", "llama.cpp", "llama.cpp-ram"
"""What the others are held against: naive streaming, llama.cpp under the same cap, llama.cpp without one."""


@dataclass(frozen=True)
class Rung:
    """A way to run our own runtime.

    predictor: as `RunConfig` has it; None is the ladder's. half: at most half of the weights stay in memory.
    apart: every part of a bundle is a read of its own. packed: on the store as `pack` wrote it.
    """

    name: str
    what: str
    predictor: str | None = None
    mode: Mode = "cached"
    backend: BackendName = "native"
    reader: ReaderName = "auto"
    half: bool = False
    apart: bool = False
    packed: bool = False
    lookahead: bool = False


@dataclass(frozen=True)
class Peer:
    """Another program. `needs`: modules its Python must have; `takes`: `gguf` or `checkpoint`."""

    name: str
    what: str
    module: str
    needs: tuple[str, ...]
    takes: str
    capped: bool = True


@dataclass(frozen=True)
class Contender:
    """Somebody who runs: a module that takes a job, under a Python, on a model. `rung`, `predictor`: of ours.

    comparable: it computes the function of the store's weights, so that logits and perplexity can be compared.
    capped: in a cgroup of the cap, its files cold; else without a limit, its files warm. caps: those it runs under
    (None: all).
    """

    name: str
    what: str
    module: str
    model: Path
    python: str
    rung: Rung | None = None
    predictor: str = ""
    comparable: bool = True
    capped: bool = True
    caps: frozenset[int] | None = None

    @property
    def files(self) -> list[Path]:
        """What it reads."""
        return [p for p in self.model.iterdir() if p.is_file()] if self.model.is_dir() else [self.model]


LADDER = (
    Rung(NAIVE, "every weight is read for every token; torch, reads by threads", "all", "naive", "torch", "threads",
         packed=True),
    Rung("hybrid", "half of the weights stay in memory, as far as the cap allows; the rest is read for every token",
         "all", "cached", "torch", "threads", half=True, packed=True),
    Rung("predictor", "only neurons that are named are read, each part of one by a read of its own; none stays", None,
         "always-miss", "torch", "threads", apart=True, packed=True),
    Rung("window", "+ neurons of the last tokens stay in memory", None, "cached", "torch", "threads", apart=True,
         packed=True),
    Rung("bundled", "+ bundles are read whole, in the calibrated order", None, "cached", "torch", "threads"),
    Rung("native", "+ native kernels and io_uring"),
)  # fmt: skip
"""The rungs of arXiv 2312.11514 (section 5, tables 2 and 3), and one more. Each adds one thing to the one before."""

OTHERS = (
    Rung("exact", "the native rung with exact selection by the whole decision matrix", "exact"),
    Rung("certified", "the native rung with exact selection by the 8-bit copy of the matrix", "certified"),
    Rung("low-rank", "the native rung with low-rank predictors", "low-rank"),
    Rung("low-rank+lookahead", "the same, each layer named while the one before computes", "low-rank", lookahead=True),
    Rung("threshold", "the native rung without neurons whose activation is small", "threshold"),
    Rung(
        "router+lookahead",
        "the native rung, each layer's router asked while the one before computes",
        "router",
        lookahead=True,
    ),
)
"""The native rung with other predictors."""

PEERS = (
    Peer(LLAMA, "llama-cpp-python, a mapped GGUF file (not repacked where it exceeds the cap)", "run_llama",
         ("llama_cpp",), "gguf"),
    Peer(IN_RAM, "the same without a cap, its file in the page cache", "run_llama", ("llama_cpp",), "gguf", False),
    Peer("accelerate", "transformers with accelerate's disk offload", "run_accelerate",
         ("accelerate", "transformers", "torch"), "checkpoint"),
    Peer("airllm", "AirLLM on the CPU, one layer in memory at a time", "run_airllm", ("airllm",), "checkpoint"),
    Peer("loop", "a plain loop in torch: all matrices streamed for every token", "run_loop", ("torch",), "checkpoint"),
)  # fmt: skip
"""Other programs as their users run them, and what somebody would write in an afternoon."""

QUANTISED = "llama.cpp-quantised"
"""Stands, in the list of names, for llama.cpp with the best quantisation that fits a cap; its own name says which."""

NAMES = (*(r.name for r in (*LADDER, *OTHERS)), *(p.name for p in PEERS), QUANTISED)
"""What `--only` takes."""
