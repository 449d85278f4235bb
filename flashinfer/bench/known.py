"""What was measured on this machine before: disk curves and rates, in a small file of the user's cache directory.

The file is a convenience: one that is missing, damaged, of another version or not writable means nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from flashinfer import __distribution__
from flashinfer.bench.place import Place
from flashinfer.config import DiskCurve, Rates
from flashinfer.units import MIB

SCHEMA_VERSION = 2
ENOUGH = 256 * MIB
"""A curve taken on a file of this size holds for every larger one; a smaller file may lie in the device's own cache."""


class KnownDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured curve; `when` is an ISO date and time, `note` how it was read."""

    curve: DiskCurve
    file_bytes: int
    when: str
    note: str


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known: disks by device and filesystem, rates by backend, processor, threads and codec."""

    schema_version: int = SCHEMA_VERSION
    disks: dict[str, KnownDisk] = {}
    rates: dict[str, Rates] = {}

    def disk(self, place: Place, file_bytes: int) -> KnownDisk | None:
        """The curve of that place, if it was taken on a file large enough to hold for this one."""
        found = self.disks.get(disk_key(place))
        return found if found is not None and found.file_bytes >= min(file_bytes, ENOUGH) else None


def disk_key(place: Place) -> str:
    """What a curve is remembered by."""
    return f"{place.device} | {place.filesystem}"


def cache_file() -> Path:
    """`measured.json` in this program's folder of the user's cache directory (XDG_CACHE_HOME)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / __distribution__ / "measured.json"


def load_known() -> Known:
    """What the file says; nothing where it cannot be used."""
    try:
        known = msgspec.json.decode(cache_file().read_bytes(), type=Known)
    except (OSError, RuntimeError, msgspec.MsgspecError, UnicodeDecodeError):  # RuntimeError: no home directory
        return Known()
    return known if known.schema_version == SCHEMA_VERSION else Known()


def remember(*, disk: tuple[Place, KnownDisk] | None = None, rates: tuple[str, Rates] | None = None) -> bool:
    """Add to the file, atomically; returns whether it could be written."""
    known = load_known()
    known = Known(
        disks=known.disks | ({disk_key(disk[0]): disk[1]} if disk else {}),
        rates=known.rates | ({rates[0]: rates[1]} if rates else {}),
    )
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
        return True
    return False
