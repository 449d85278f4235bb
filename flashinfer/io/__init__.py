"""From missing records to bytes in memory: plan the reads, read, several in flight, past the page cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashinfer.config import IoConfig
from flashinfer.errors import PlatformError
from flashinfer.io.buffers import AlignedBuffer
from flashinfer.io.kvikio import KvikioReader
from flashinfer.io.memory import MemoryReader
from flashinfer.io.plan import (
    RangePlan,
    RecordPlan,
    cheapest,
    group_tiles,
    plan_range,
    plan_records,
    worst_case_bytes,
)
from flashinfer.io.reader import DeviceReader, Extents, Pending, Reader, ReaderFactory, ReadStats
from flashinfer.io.threads import ThreadReader
from flashinfer.io.uring import UringReader

__all__ = [
    "AlignedBuffer",
    "DeviceReader",
    "Extents",
    "KvikioReader",
    "MemoryReader",
    "Pending",
    "RangePlan",
    "ReadStats",
    "Reader",
    "ReaderFactory",
    "RecordPlan",
    "ThreadReader",
    "UringReader",
    "cheapest",
    "group_tiles",
    "open_host_reader",
    "open_reader",
    "plan_range",
    "plan_records",
    "worst_case_bytes",
]


def open_reader(paths: Sequence[Path], config: IoConfig) -> Reader:
    """The reader for these files on this machine; its `note` says how it reads, and why not with io_uring.

    Raises:
        StoreError: a file cannot be opened.
        PlatformError: on Windows, or a reader was asked for by name and cannot read here.
    """
    host = open_host_reader(paths, config)
    if config.reader != "kvikio":
        return host
    try:
        return KvikioReader(paths, host, threads=config.threads)
    except PlatformError as error:
        host.close()
        raise PlatformError(f"{error}; or read without --reader kvikio") from error
    except BaseException:
        host.close()
        raise


def open_host_reader(
    paths: Sequence[Path], config: IoConfig, *, direct: bool = True, timed: bool = False
) -> ThreadReader | UringReader:
    """As `open_reader`, to the host's memory alone.

    Without `direct`, reads go through the page cache. `timed`: how long each read took can be asked for.
    """
    if config.reader == "threads":
        return ThreadReader(paths, threads=config.threads, direct=direct, timed=timed)
    try:
        return UringReader(paths, depth=config.depth, direct=direct, timed=timed)
    except PlatformError as error:
        if config.reader == "io_uring":
            raise PlatformError(f"no io_uring here: {error}; read with threads") from error
        why = error
    reader = ThreadReader(paths, threads=config.threads, direct=direct, timed=timed)
    reader.note += f"; not with io_uring: {why}"
    return reader
