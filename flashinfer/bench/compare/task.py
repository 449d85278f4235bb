"""What the command was asked: the inputs that decide who runs, and what everybody then does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wanted:
    """Inputs. folder: where files made for the peers are kept; stand_in: the checkpoint is another one of the same
    shape; predictor: the ladder's, None for the default; caps: bytes; only: names, none for everybody."""

    store: Path
    packed: Path | None
    checkpoint: Path | None
    stand_in: bool
    gguf: tuple[Path, ...]
    quants: tuple[str, ...]
    folder: Path
    python: str
    predictor: str | None
    caps: tuple[int, ...]
    only: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What everybody does, and how often. prompt, script: token ids; context: tokens; probe, timeout: seconds, for one
    look at the raw disk and for one run; grouped: in memory cgroups; scratch: where peers may keep files."""

    caps: tuple[int, ...]
    prompt: list[int]
    script: list[int]
    context: int
    kv_type: str
    rounds: int
    probe: float
    timeout: float
    grouped: bool
    scratch: Path


def repeated(wanted: Wanted, task: Task, text: Path | None) -> str:
    """The command that does the same again, with the names of files and without their folders."""
    words = ["flashinfer bench compare", wanted.store.name, *(f"--memory {cap}" for cap in task.caps)]
    checkpoint = "--peer-checkpoint" if wanted.stand_in else "--checkpoint"
    for option, path in (("--packed", wanted.packed), (checkpoint, wanted.checkpoint), ("--text", text)):
        words += [f"{option} {path.name}"] if path else []
    words += [f"--gguf {path.name}" for path in wanted.gguf] + [f"--gguf-quant {quant}" for quant in wanted.quants]
    words += ["--peer-python PYTHON"] if wanted.checkpoint or wanted.gguf else []
    words += [f"--predictor {wanted.predictor}"] if wanted.predictor else []
    words += [f"--context {task.context} -n {len(task.script)} --prompt-tokens {len(task.prompt)}"]
    words += [f"--rounds {task.rounds} --kv-type {task.kv_type}", *(f"--only {name}" for name in wanted.only)]
    return " ".join([*words, *([] if task.grouped else ["--no-cgroup"])])
