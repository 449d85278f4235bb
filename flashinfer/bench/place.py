"""Where a file lies: filesystem and device, for the reader of a measurement (Linux; elsewhere unknown)."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashinfer.units import KIB

_SYS = Path("/sys/dev/block")
_CLASS = Path("/sys/class/block")
_MOUNTS = Path("/proc/self/mountinfo")
UNKNOWN = "unknown"
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "afs", "9p", "virtiofs", "glusterfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.ceph"}
)
"""Filesystems whose bytes come from another machine (or, for 9p and virtiofs, through the host of this one)."""
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})

Kind = Literal["rotational", "ssd", "virtual", "network", "memory", "unknown"]

KINDS: dict[Kind, tuple[str, str]] = {
    "ssd": ("solid state", ""),
    "rotational": ("a rotating disk", "random reads will be slow: move the store to a solid-state disk"),
    "virtual": ("a virtual disk", ""),
    "network": ("a network filesystem", "reads cross the network, at its speed: copy the store to a local disk"),
    "memory": ("a filesystem in memory", "the store itself takes memory, outside any cap: keep it on a disk"),
    "unknown": ("a device the system does not describe", ""),
}
"""What each is called, and what to do about a store that lies there."""


@dataclass(frozen=True)
class Place:
    """Names for people; `unknown` where the system does not tell. A virtual disk's own speed is not to be told."""

    filesystem: str
    device: str
    kind: Kind = "unknown"


def place_of(path: Path) -> Place:
    """The filesystem and the device under this path. Raises OSError where there is no such path."""
    path = path.resolve()
    filesystem, source = _mount_of(path)
    folder = _folder_of(path, source)
    device = UNKNOWN if folder is None else _device(folder)
    if folder is None and source.partition("/")[2]:
        device = source  # the server and its export, or what else the mount names
    return Place(filesystem, device, _kind(filesystem, folder))


def read_ahead_of(path: Path) -> int | None:
    """Bytes the kernel reads at most around one asked for through the page cache, a fault in a mapping among them; None
    where it does not say. Direct reads know nothing of it. Raises OSError where there is no such path."""
    path = path.resolve()
    folder = _folder_of(path, _mount_of(path)[1])
    if folder is None:
        return None
    try:
        return int((folder / "queue" / "read_ahead_kb").read_text()) * KIB
    except (OSError, ValueError):
        return None


def _mount_of(path: Path) -> tuple[str, str]:
    """Type and source of the innermost mount above the path; of two at one place the later one hides the other."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return UNKNOWN, ""
    best, found = -1, (UNKNOWN, "")
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        if len(mount.parts) >= best and path.is_relative_to(mount):
            filesystem, source, *_ = [*right.split(), ""]
            best, found = len(mount.parts), (filesystem, source)
    return found


def _folder_of(path: Path, source: str) -> Path | None:
    """The kernel's folder for the disk (not the partition): by device number, else by what is mounted (btrfs, zfs)."""
    number = path.stat().st_dev
    named = [_CLASS / Path(source).name] if source.startswith("/dev/") else []
    for link in (_SYS / f"{os.major(number)}:{os.minor(number)}", *named):
        with contextlib.suppress(OSError):
            folder = link.resolve(strict=True)
            return folder.parent if (folder / "partition").exists() else folder
    return None


def _device(folder: Path) -> str:
    """Kernel name, bus, and the model or whether it turns."""
    words = [folder.name]
    words += ["virtio disk"] if "virtio" in str(folder) else []
    with contextlib.suppress(OSError):
        words.append((folder / "device" / "model").read_text().strip())
    words += ["says it is rotational"] if _turns(folder) else []
    return ", ".join(words)


def _turns(folder: Path) -> bool | None:
    try:
        return (folder / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return None


def _kind(filesystem: str, folder: Path | None) -> Kind:
    if filesystem in NETWORK:
        return "network"
    if filesystem in IN_MEMORY:
        return "memory"
    if folder is None:
        return "unknown"
    if any(word in str(folder) for word in ("virtio", "xen", "/loop", "/zram", "/vbd")):
        return "virtual"
    turns = _turns(folder)
    return "unknown" if turns is None else "rotational" if turns else "ssd"
