"""Every error this package raises on purpose.

    FlashInferError            caught by the CLI: one line on stderr, exit 1
    ├── CheckpointError        what the user gave to `pack`, or an adapter, cannot be used
    │   └── LayoutError        no layout fits it, or the layout file itself is wrong
    ├── StoreError             a weight store is missing, damaged or too new
    │   ├── StoreReadError     an I/O error while reading it: file, offset, length
    │   └── StoreBusyError     another writer holds its lock
    ├── PredictorError         the store has no such predictor: it was not calibrated, or not for that or an adapter
    ├── QuantError             a store cannot be quantised as asked
    ├── DiskFullError          not enough room on the disk for what was asked
    ├── CapTooSmallError       the memory cap lies below the floor; `.floor` says it
    ├── CapTooLargeError       the memory cap lies above what this process may use; `.usable` says it
    ├── CapExceededError       the process grew past the cap it promised to keep (our bug; never hidden)
    ├── PromptError            the prompt is empty or does not fit the context
    ├── ChatTemplateError      there is no chat template, or it cannot be used
    ├── TextError              the text to learn or to judge from cannot be used
    ├── PlotError              a plot cannot be drawn or written
    ├── SessionError           a session file is damaged, or belongs to another store
    ├── TraceError             a trace file cannot be written
    ├── RecordingError         a recording of activations cannot be written, or is damaged
    ├── DeviceError            the asked compute device is not there
    ├── CgroupError            a measurement needs a memory cgroup, and none can be made
    ├── PeerError              what a comparison runs against cannot be prepared
    └── PlatformError          this operating system is not supported

A message says what, where, what was expected and what to do next, in one line.
A lower-level error (OSError, JSON, ...) is always mapped to one of these at the boundary where
its meaning is known. `assert` is for our own bugs only.
"""

from __future__ import annotations


class FlashInferError(Exception):
    """Base of the tree above."""


class CheckpointError(FlashInferError):
    """A checkpoint or an adapter is missing, damaged, or not something that can be packed or applied."""


class LayoutError(CheckpointError):
    """No layout fits the checkpoint, or a layout file breaks its schema."""


class StoreError(FlashInferError):
    """The weight store is missing, damaged, half-written or of a newer version."""


class PredictorError(FlashInferError):
    """The store does not carry the predictor, or the level of it, that is asked for."""


class QuantError(FlashInferError):
    """A store cannot be quantised as asked: it is already, a value does not fit, or too much would be lost."""


class StoreReadError(StoreError):
    """A read of the store failed or came back short.

    Attributes:
        path: the file.
        offset: first byte asked, from the start of the file.
        length: bytes asked.
    """

    def __init__(self, path: str, offset: int, length: int, reason: str) -> None:
        self.path, self.offset, self.length = path, offset, length
        super().__init__(
            f"reading {length} bytes at offset {offset} of {path} failed: {reason}; "
            "check the disk, then run `flashinfer verify` on the store"
        )


class StoreBusyError(StoreError):
    """Another process is writing this store."""


class DiskFullError(FlashInferError):
    """The target filesystem has no room for the result."""


class CapTooSmallError(FlashInferError):
    """The memory cap is below what this model needs at the least.

    Attributes:
        floor: the smallest cap that would be accepted, in bytes.
    """

    def __init__(self, message: str, floor: int) -> None:
        self.floor = floor
        super().__init__(message)


class CapTooLargeError(FlashInferError):
    """The memory cap is more than this process may use, so that it would bound nothing.

    Attributes:
        usable: the largest cap that would be accepted now, in bytes.
    """

    def __init__(self, message: str, usable: int) -> None:
        self.usable = usable
        super().__init__(message)


class CapExceededError(FlashInferError):
    """Peak memory of the process went above the cap the plan promised."""


class PromptError(FlashInferError):
    """The prompt is empty, or longer than the context."""


class ChatTemplateError(FlashInferError):
    """There is no chat template, it refuses the messages, or it does what a template must not."""


class TextError(FlashInferError):
    """The text for `calibrate` or `eval` cannot be read, is empty, no UTF-8, or shorter than a window."""


class PlotError(FlashInferError):
    """A plot cannot be drawn, for want of what draws it, or cannot be written."""


class SessionError(FlashInferError):
    """A session file is truncated, altered, of another store, or cannot be written."""


class TraceError(FlashInferError):
    """The timeline of a run cannot be written; the run itself is not concerned."""


class RecordingError(FlashInferError):
    """A recording of activations cannot be written or read, is cut short or damaged, or does not fit the store."""


class DeviceError(FlashInferError):
    """The compute device asked for is not available."""


class CgroupError(FlashInferError):
    """No memory cgroup can be made here: not Linux, or no permission."""


class PeerError(FlashInferError):
    """A model cannot be converted for another program to run, or nothing is left to compare."""


class PlatformError(FlashInferError):
    """The operating system is not supported."""
