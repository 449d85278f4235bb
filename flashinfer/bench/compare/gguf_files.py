"""GGUF files for llama.cpp: which of them are quantised, which fits a cap, and which have to be made first."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashinfer.bench.compare.launch import only_peers
from flashinfer.errors import PeerError

_QUANT = re.compile(r"[-._](i?q\d\w*)$", re.IGNORECASE)
QUANTS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
"""What llama.cpp's quantiser is asked for here."""


@dataclass(frozen=True)
class GgufFiles:
    """The file of full precision (None: there is none), quantised ones, and of these the ones to be made first.

    Where all that is given is one quantised file, it is in place of full precision: that is how the model is had.
    """

    full: Path | None
    quantised: tuple[Path, ...]
    missing: tuple[Path, ...]


def quant_of(path: Path) -> str | None:
    """The quantisation that a file's name ends in, as names of GGUF files do; None: it says none."""
    match = _QUANT.search(path.stem)
    return match[1].lower() if match else None


def plan_files(given: Sequence[Path], checkpoint: Path | None, quants: Sequence[str], folder: Path) -> GgufFiles:
    """The files given; where they lack one of full precision, the checkpoint's, and its quantisations, in `folder`.

    Raises:
        PeerError: two files of full precision, or quantisations of nothing.
    """
    full = [path for path in given if quant_of(path) is None]
    if len(full) > 1:
        raise PeerError(
            f"{full[0].name} and {full[1].name} both seem to be of full precision; name quantised files "
            "after what they are, as in model-q4_0.gguf"
        )
    if not full and checkpoint is not None:
        full = [folder / f"{checkpoint.resolve().name}.gguf"]
    elif len(given) == 1 and not quants:
        return GgufFiles(given[0], (), tuple(path for path in given if not path.exists()))
    if quants and not full:
        raise PeerError("--gguf-quant needs a model to quantise: give --checkpoint, or a --gguf of full precision")
    made = [folder / f"{full[0].stem}-{quant}.gguf" for quant in quants]
    files = (*full, *made)
    quantised = [path for path in given if quant_of(path)] + made
    return GgufFiles(full[0] if full else None, tuple(quantised), tuple(p for p in files if not p.exists()))


def best_that_fits(sizes: Mapping[Path, int], cap: int) -> Path | None:
    """Of these files (bytes of each) the largest below the cap: the least is lost, and it can stay in memory."""
    fitting = [path for path, size in sizes.items() if size < cap]
    return max(fitting, key=lambda path: sizes[path]) if fitting else None


def make_files(files: GgufFiles, checkpoint: Path | None, python: str, say: Callable[[str], None]) -> None:
    """Make what is missing with llama.cpp's own tools, as that Python has them. Raises PeerError."""
    for path in files.missing:
        quant, source = quant_of(path), checkpoint
        if quant is not None:
            source = files.full
        if source is None or source == path:
            raise PeerError(f"{path} does not exist; give a GGUF file, or what to make it from with --checkpoint")
        say(f"making {path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        module, extra = ("to_gguf", []) if quant is None else ("quantise", [quant])
        with only_peers() as folder:
            command = [python, "-m", f"peers.{module}", str(source.resolve()), str(path.resolve()), *extra]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", cwd=folder)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise PeerError(f"{path.name} could not be made: {why}; make it by hand and give it with --gguf")
