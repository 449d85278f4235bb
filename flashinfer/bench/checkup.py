"""What `doctor` looks at: this machine, and the place a store lies in, each with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from flashinfer import __distribution__, __version__, machine
from flashinfer.backend import has_native, has_triton
from flashinfer.bench.known import cache_file, disk_key, load_known
from flashinfer.bench.place import KINDS, UNKNOWN, Place, place_of
from flashinfer.config import IoConfig
from flashinfer.errors import FlashInferError
from flashinfer.io import uring
from flashinfer.io.files import describe, open_file
from flashinfer.io.kvikio import load_kvikio
from flashinfer.store import open_store
from flashinfer.units import GIB, format_size

FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "f16c": ("f16c",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "neon": ("neon", "asimd"),
}
"""Our names of processor features, and those the kernel uses."""
PACKAGES = ("torch", "numpy", "msgspec", "sentencepiece", "tokenizers", "typer", "rich", "xxhash", "zstandard")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and what to do where it could be better."""

    name: str
    status: Literal["ok", "warn"]
    text: str
    advice: str = ""


def check(name: str, text: str, advice: str = "") -> Check:
    """A warning where there is something to do."""
    return Check(name, "warn" if advice else "ok", text, advice)


def examine(path: Path | None) -> Iterator[Check]:
    """Every check, in order; the place of `path` (a store, a directory, a file) among them if it is given."""
    yield from _system()
    yield from _processor()
    yield from _memory()
    if path is not None:
        yield from _place(path)
    yield from _software()


def _system() -> Iterator[Check]:
    supported = sys.platform == "linux"
    advice = "" if supported else "only Linux is tested; reads are not direct in the same way elsewhere"
    yield check("system", f"{platform.system()} {platform.release()}, {platform.machine()}", advice)


def _processor() -> Iterator[Check]:
    flags = {
        word for line in machine.cpu_info() if line.lower().startswith(("flags", "features")) for word in line.split()
    }
    found = [name for name, names in FEATURES.items() if flags.intersection(names)]
    slow = platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in found
    advice = "without avx2 arithmetic will be slow" if slow else ""
    yield check("processor", machine.processor_name(), advice)
    yield check("features", ", ".join(found) if found else "none known, or the system does not tell")
    threads, cores = machine.compute_threads(), os.cpu_count() or 1
    yield check("threads", f"{threads} of {cores} cores may be used")
    yield _arithmetic()


def _memory() -> Iterator[Check]:
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    usable = machine.usable_memory()
    advice = "close other programs, or run with a small --memory" if usable < GIB else ""
    yield check("memory", f"{format_size(ram.total)}, {format_size(usable)} usable by this process", advice)
    advice = "much of it is in use: a machine that pages is slower than any plan" if swap.used > swap.total // 2 else ""
    yield check("swap", f"{format_size(swap.total)}, {format_size(swap.used)} in use" if swap.total else "none", advice)
    limits = machine.memory_limits()
    for limit in limits:
        used = "" if limit.used is None else f", {format_size(limit.used)} in use"
        yield check(f"cgroup v{limit.version}", f"{format_size(limit.bytes)} ({limit.file}{used})")
    if not limits:
        yield check("cgroup", "no memory limit")


def _place(path: Path) -> Iterator[Check]:
    try:
        place, file = place_of(path), _file_in(path)
    except OSError as e:
        yield Check("path", "warn", f"{path}: {e.strerror}", "give a store, a directory or a file that exists")
        return
    yield check("filesystem", place.filesystem)
    what, advice = KINDS[place.kind]
    yield check("device", what if place.device == UNKNOWN else f"{place.device}: {what}", advice)
    if (path / "manifest.json").exists():
        yield _store(path)
    yield _direct(file)
    yield _reader(file)
    yield _curve(place)


def _file_in(path: Path) -> Path | None:
    """The largest file there, on which a direct read can be tried."""
    if path.is_file():
        return path
    files = [f for f in path.iterdir() if f.is_file() and not f.is_symlink() and f.stat().st_size]
    return max(files, key=lambda f: f.stat().st_size, default=None)


def _store(path: Path) -> Check:
    try:
        manifest = open_store(path).manifest
    except FlashInferError as e:
        return Check("store", "warn", " ".join(str(e).split()), "pack the checkpoint again")
    return check("store", f"{manifest.facts.family}, {format_size(manifest.weight_bytes())} of weights")


def _direct(file: Path | None) -> Check:
    if file is None:
        return check("direct reads", "not tried: there is no file to read", "give a store or a file")
    try:
        opened = open_file(file, direct=True)
    except FlashInferError as e:
        return Check("direct reads", "warn", str(e), "check the path and its permissions")
    try:
        advice = "" if opened.refusal is None else "reads go through the page cache, which costs CPU time and memory"
        return check("direct reads", describe([opened]), advice)
    finally:
        opened.close()


def _arithmetic() -> Check:
    """What computes, and why not the native core where it does not."""
    try:
        from flashinfer.native import _kernels
    except ImportError as e:
        why = "it was not built" if not has_native() else f"it cannot be loaded: {e}"
        return check("arithmetic", f"torch; not the native core: {why}", "install again where there is a C++ compiler")
    return check("arithmetic", f"the native core, with {_kernels.available()[0]} instructions")


def _reader(file: Path | None) -> Check:
    try:
        why_not = uring.why_not(Path(__file__) if file is None else file)
    except FlashInferError as e:
        return Check("reader", "warn", str(e), "check the path and its permissions")
    if why_not is None:
        return check("reader", f"io_uring, up to {IoConfig.depth} reads in flight, as found by a trial read")
    advice = "threads read as well, but take several times the CPU time; containers often forbid io_uring"
    return check("reader", f"{IoConfig.threads} threads, not io_uring: {why_not}", advice)


def _curve(place: Place) -> Check:
    known = load_known().disks.get(disk_key(place))
    if known is None:
        return check("disk curve", f"not measured yet ({cache_file()})", "run `flashinfer plan STORE`")
    c = known.curve
    text = f"{1e6 * c.per_read_s:.1f} us a read, {c.bytes_per_s / 1e9:.2f} GB/s, latency {1e6 * c.latency_s:.0f} us"
    return check("disk curve", f"{text}, measured {known.when}")


def _software() -> Iterator[Check]:
    versions = [f"{__distribution__} {__version__}", f"Python {platform.python_version()}"]
    missing = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield check("versions", ", ".join(versions), f"install {', '.join(missing)}" if missing else "")
    yield from _gpu()


def _gpu() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield check("GPU", "not looked for: torch is not installed")
        return
    try:
        import torch

        if not torch.cuda.is_available():
            yield check("GPU", f"none that torch {torch.__version__} can use; the CPU computes")
            return
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as e:  # a broken driver or a broken torch: whatever it raises is what there is to say
        yield Check("GPU", "warn", f"torch fails: {' '.join(str(e).split())}", "reinstall torch, or its driver")
        return
    yield check("GPU", f"{', '.join(names)} (used with --device cuda)")
    yield _gpu_kernels()
    yield _gpu_reads()


def _gpu_kernels() -> Check:
    """What computes the feed-forward on a card."""
    if not has_triton():
        advice = "pip install 'flashinfer-offload[gpu]'"
        return check("GPU kernels", "torch's, which are slow; Triton is not installed", advice)
    from flashinfer.backend.triton_backend import why_not

    if why := why_not("cuda"):
        return check("GPU kernels", f"torch's, which are slow; Triton's do not run: {why}", "install a C compiler")
    return check("GPU kernels", f"Triton's, {importlib.metadata.version('triton')}")


def _gpu_reads() -> Check:
    """How what goes to a card is read; straight there only where that is asked for, since nobody measured it yet."""
    try:
        straight = load_kvikio(Path(__file__)).how
    except FlashInferError as e:
        return check("GPU reads", f"through the host's memory; {e}")
    return check("GPU reads", f"through the host's memory; with --reader kvikio: {straight}")
