"""Where a file lies: filesystem and device, for the reader of a measurement."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys/dev/block")
_MOUNTS = Path("/proc/self/mountinfo")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Place:
    """Names for people; `unknown` where the system does not tell."""

    filesystem: str
    device: str


def place_of(path: Path) -> Place:
    """The filesystem and the device under this path (Linux; elsewhere unknown)."""
    return Place(_filesystem(path.resolve()), _device(path))


def _filesystem(path: Path) -> str:
    """The type of the innermost mount above the path; of two at one place the later one hides the other."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return UNKNOWN
    best, found = -1, UNKNOWN
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        if len(mount.parts) >= best and path.is_relative_to(mount):
            best, found = len(mount.parts), right.split()[0]
    return found


def _device(path: Path) -> str:
    """Kernel name, bus, and the model or whether it turns; the disk and not the partition."""
    number = path.stat().st_dev
    try:
        folder = (_SYS / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    except OSError:
        return UNKNOWN
    if (folder / "partition").exists():
        folder = folder.parent
    words = [folder.name]
    words += ["virtio disk"] if "virtio" in str(folder) else []
    with contextlib.suppress(OSError):
        words.append((folder / "device" / "model").read_text().strip())
    with contextlib.suppress(OSError):
        turns = (folder / "queue" / "rotational").read_text().strip() == "1"
        words += ["says it is rotational"] if turns else []
    return ", ".join(words)
