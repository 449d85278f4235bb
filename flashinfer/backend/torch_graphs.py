"""Small operations in a row, recorded once on a card and then started as one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replayed:
    """Calls a function that takes and gives nothing, reads and writes tensors that stay where they are, never looks at
    a value on the host, and has the same shapes in every call.

    On a card the first call is an ordinary one, in which libraries get ready; in the second it is recorded as a CUDA
    graph, which every call from then on replays. What it allocates meanwhile stays its own. Elsewhere it is called.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self._run, self._records, self._calls = run, device.type == "cuda", 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run it."""
        self._calls += 1
        if not self._records or self._calls == 1:
            self._run()
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # others may allocate and wait meanwhile: the copy engine does, on its own stream
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
            self._graph = graph
        self._graph.replay()
