"""From missing records to bytes in memory: plan the reads, read, several in flight, past the page cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashinfer.config import IoConfig
from flashinfer.io.buffers import AlignedBuffer
from flashinfer.io.memory import MemoryReader
from flashinfer.io.plan import (
    RangePlan,
    RecordPlan,
    group_tiles,
    plan_range,
    plan_records,
    worst_case_bytes,
)
from flashinfer.io.reader import Extents, Pending, Reader, ReaderFactory, ReadStats
from flashinfer.io.threads import ThreadReader

__all__ = [
    "AlignedBuffer",
    "Extents",
    "MemoryReader",
    "Pending",
    "RangePlan",
    "ReadStats",
    "Reader",
    "ReaderFactory",
    "RecordPlan",
    "ThreadReader",
    "group_tiles",
    "open_reader",
    "plan_range",
    "plan_records",
    "worst_case_bytes",
]


def open_reader(paths: Sequence[Path], config: IoConfig) -> Reader:
    """The reader for these files on this machine; its `note` says how it reads.

    Raises:
        StoreError: a file cannot be opened.
        PlatformError: on Windows.
    """
    return ThreadReader(paths, threads=config.threads)
