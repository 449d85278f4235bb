"""What every contender does, whatever computes: load, prompt, forced tokens; one JSON line on stdout for each step.

Standard library and numpy only: it also runs where flashinfer is not installed. Ours reports in the same way.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Step = Callable[[Sequence[int]], npt.NDArray[np.float32]]
"""Appends tokens to the context; the logits after the last of them."""


def job() -> dict[str, Any]:
    """What `contest` asks for: the one argument of the command line."""
    return dict(json.loads(sys.argv[1]))


def tell(at: str, **facts: Any) -> None:
    """One line for the parent."""
    print(json.dumps({"at": at, **facts}), flush=True)


def ask(at: str) -> dict[str, Any]:
    """As `tell`, and wait for what the parent answers (it measures something meanwhile)."""
    tell(at)
    return dict(json.loads(sys.stdin.readline()))


def device_bytes() -> int | None:
    """Bytes the kernel fetched from storage for this process so far: direct reads, and page faults of a mapping. None
    where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


def peak_resident() -> int:
    """The most this process was ever resident, in bytes; pages of mapped files are among them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(load: Callable[[], Step], wanted: dict[str, Any], between: Callable[[int], None] = lambda _: None) -> None:
    """Load, process the prompt, replay the script token by token; `between` runs before each token, untimed. The
    logits after the prompt and after every token, `[tokens + 1, vocab]`, go to a file."""
    started = time.perf_counter()
    step = load()
    tell("loaded", seconds=time.perf_counter() - started)
    started = time.perf_counter()
    logits = [step(wanted["prompt"]).copy()]
    tell("prompt", seconds=time.perf_counter() - started)
    for n, token in enumerate(wanted["script"]):
        between(n)
        before, started = device_bytes(), time.perf_counter()
        out = step([token])
        seconds, after = time.perf_counter() - started, device_bytes()
        tell("token", seconds=seconds, device_bytes=None if before is None or after is None else after - before)
        logits.append(out.copy())
    np.save(wanted["logits"], np.stack(logits))


def end(version: str, **facts: Any) -> None:
    """The last line."""
    tell("end", version=version, peak_resident=peak_resident(), **facts)
