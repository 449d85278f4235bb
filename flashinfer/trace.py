"""A timeline of a run as a file: Chrome's trace event format, shown by ui.perfetto.dev and chrome://tracing.

The file is one JSON array. Of the format's events it uses `X` (a span: `ts` and `dur` in microseconds; those of a
thread lie within each other), `b` and `e` (a read batch from submit until it was seen complete, by `id`; they
overlap), `C` (a counter) and `M` (a name).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from flashinfer.errors import TraceError

_EVENTS_AT_ONCE = 512
"""Events kept before they are written: some 60 KB."""


class Trace:
    """Writes the timeline to a temporary file beside `path`, which becomes `path` on `close`; a context manager.

    Events go to the file as they come. What fails while writing ends the trace, not the run: `close` says it.

    Raises:
        TraceError: there can be no file at `path`.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise TraceError(f"trace {path} is not a file; give another name")
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._error: OSError | None = None
        self._events: list[str] = []
        self._size = 0
        self._bytes_read: dict[str, int] = {}
        self._batches = 0
        self._started = time.perf_counter()
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise self._failed(e) from e
        self._event("M", "process_name", self._started, args={"name": "flashinfer"})
        self._event("M", "thread_name", self._started, args={"name": "model"})

    def span(self, name: str, started: float, ended: float, args: dict[str, Any]) -> None:
        """What lay between two readings of `time.perf_counter`."""
        self._event("X", name, started, dur=_microseconds(ended - started), args=args)

    def reads_submitted(self, name: str, size: int, reads: int) -> int:
        """A batch of reads of `size` bytes is on its way; returns its number."""
        now = time.perf_counter()
        self._batches += 1
        self._event("b", name, now, cat="reads", id=self._batches, args={"bytes": size, "reads": reads})
        self._bytes_read[name] = self._bytes_read.get(name, 0) + size
        self._event("C", f"{name}: bytes read", now, args={"bytes": self._bytes_read[name]})
        return self._batches

    def reads_seen(self, name: str, batch: int) -> None:
        """The batch of that number was found complete: it may have been for some time."""
        self._event("e", name, time.perf_counter(), cat="reads", id=batch)

    def close(self) -> None:
        """Write what is left and give the file its name. Idempotent.

        Raises:
            TraceError: it could not be written; nothing of it is left, and what was at its place still is.
        """
        if self._fd < 0:
            return
        try:
            if self._error is None:
                self._write("\n]\n")
                os.fsync(self._fd)
                self._temporary.replace(self._path)
        except OSError as e:
            self._error = e
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)
            self._temporary.unlink(missing_ok=True)
        if self._error is not None:
            raise self._failed(self._error)

    def _event(self, phase: str, name: str, at: float, **more: Any) -> None:
        if self._error is not None or self._fd < 0:
            return
        event = {"ph": phase, "name": name, "ts": _microseconds(at - self._started), "pid": 1, "tid": 1, **more}
        self._events.append(json.dumps(event, separators=(",", ":")))
        if len(self._events) >= _EVENTS_AT_ONCE:
            try:
                self._write()
            except OSError as e:
                self._error = e

    def _write(self, end: str = "") -> None:
        """The events so far. A Ctrl-C on the way leaves them to be written again, to the same place."""
        text = ",\n".join(self._events)
        data = ((",\n" if self._size else "[\n") * bool(text) + text + end).encode()
        at = self._size
        while data:
            written = os.pwrite(self._fd, data, at)
            at, data = at + written, data[written:]
        self._size, self._events = at, []

    def _failed(self, error: OSError) -> TraceError:
        return TraceError(f"trace {self._path} cannot be written: {error.strerror or error}; choose another place")

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error that is on its way already is the one that is told."""
        with contextlib.suppress(TraceError) if error is not None else contextlib.nullcontext():
            self.close()


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)
