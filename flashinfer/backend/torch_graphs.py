"""Small operations in a row, recorded once on a card and then started as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """What is recorded on a device. Whatever all of it allocates on its way is in the same memory.

    So nothing that a recorded call leaves may be there: it writes to tensors that were made before.
    """

    def __init__(self, device: torch.device) -> None:
        self.records = device.type == "cuda"
        self._device = device
        self._pool: Any = None
        self._mark: torch.cuda.Event | None = None

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The call as a graph; it is not made."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate and wait meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph

    def mark(self) -> None:
        """Remember the arithmetic that was asked for so far."""
        if self.records:
            self._mark = torch.cuda.current_stream(self._device).record_event(self._mark)

    def wait(self) -> None:
        """Block until what was marked last has ended; on the CPU it has."""
        if self._mark is not None:
            self._mark.synchronize()


class Replayed:
    """Calls a function that takes and gives nothing, reads and writes tensors that stay where they are, never looks at
    a value on the host, and has the same shapes in every call.

    On a card the first call is an ordinary one, in which libraries get ready; in the second it is recorded as a CUDA
    graph, which every call from then on replays. Elsewhere it is called.
    """

    def __init__(self, run: Callable[[], None], graphs: Graphs) -> None:
        self._run, self._graphs, self._warm = run, graphs, False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Make the call."""
        if not (self._graphs.records and self._warm):
            self._run()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._graphs.record(self._run)
        self._graph.replay()
