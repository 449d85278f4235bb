"""The copy engine of a CUDA device, by torch: a stream of its own, and events between it and the arithmetic's."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from flashinfer.backend.copies import Bytes, Index, runs
from flashinfer.errors import DeviceError
from flashinfer.units import MIB, format_size

OVERHEAD = 768 * MIB
"""The driver's context, the kernels of torch and its libraries, and what its allocator rounds up. An assumption: it
was not measured."""


class DeviceErrors:
    """What fails in its block for want of the device's memory is a DeviceError, which says how much of it is free."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            free, total = torch.cuda.mem_get_info(self._device)
            raise DeviceError(
                f"{self._device} ran out of memory, {format_size(free)} of its {format_size(total)} are free; lower "
                "--vram or --context, or end what else uses the card"
            ) from error


FEW = 4
"""Transfers that are left to the copy engines; more are one launch, where there is a kernel for it."""
Together = Callable[[Tensor, Index, Tensor, Index, int, torch.device], None]
Fits = Callable[[Tensor, Tensor, Index, Index, int], bool]


class CudaCopies:
    """See `backend.copies.Copies`. Arithmetic is what torch's current stream of the device does.

    many: a kernel that makes many copies at once, and which it can make (`triton_copies`); None: each is a transfer.
    """

    many: tuple[Together, Fits] | None = None

    def __init__(self, device: torch.device) -> None:
        self.overhead = OVERHEAD
        # some calls want to be told which of several devices it is
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._pinned: list[Bytes] = []
        with DeviceErrors(device):
            # the context is made here, if nobody has one yet
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def available(self) -> int:
        """See `Copies.available`: what nobody has now, and the overhead, most of which is taken already."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + self.overhead

    def limit(self, size: int) -> None:
        """See `Copies.limit`; the overhead is not torch's to allocate."""
        _, total = torch.cuda.mem_get_info(self._device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, size - self.overhead) / total), self._device)

    def allocate(self, size: int) -> Tensor:
        """See `Copies.allocate`."""
        with DeviceErrors(self._device):
            memory = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self.follow(self.mark())  # the zeros are written before anything is copied there
        memory.record_stream(self._stream)
        return memory

    def pin(self, memory: Bytes) -> None:
        """See `Copies.pin`."""
        if not memory.nbytes:
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if error := int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)):
            raise DeviceError(
                f"{format_size(memory.nbytes)} of host memory cannot be pinned (CUDA error {error}); lower --memory"
            )
        self._pinned.append(memory)

    def upload(self, memory: Tensor, targets: Index, source: Bytes, sources: Index, size: int) -> int:
        """See `Copies.upload`."""
        return self._copy(memory, targets, torch.from_numpy(source), sources, size, self._is_pinned(source))

    def download(self, target: Bytes, targets: Index, memory: Tensor, sources: Index, size: int) -> int:
        """See `Copies.download`."""
        return self._copy(torch.from_numpy(target), targets, memory, sources, size, self._is_pinned(target))

    def move(self, memory: Tensor, targets: Index, sources: Index, size: int) -> None:
        """See `Copies.move`."""
        self._copy(memory, targets, memory, sources, size, True)

    def _is_pinned(self, memory: Bytes) -> bool:
        return any(memory is pinned for pinned in self._pinned)

    def _copy(self, target: Tensor, targets: Index, source: Tensor, sources: Index, size: int, pinned: bool) -> int:
        transfers = list(runs(targets, sources, size))
        with torch.cuda.stream(self._stream), DeviceErrors(self._device):
            if len(transfers) > FEW and pinned and self.many is not None:
                copy, fits = self.many
                if fits(target, source, targets, sources, size):
                    copy(target, targets, source, sources, size, self._device)
                    return 1
            for to, at, length in transfers:
                target[to : to + length].copy_(source[at : at + length], non_blocking=True)
        return len(transfers)

    def mark(self) -> torch.cuda.Event:
        """See `Copies.mark`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, mark: torch.cuda.Event) -> None:
        """See `Copies.follow`."""
        self._stream.wait_event(mark)

    def lead(self) -> None:
        """See `Copies.lead`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """See `Copies.wait`."""
        self._stream.synchronize()

    def close(self) -> None:
        """See `Copies.close`."""
        self.wait()
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().ctypes.data)  # type: ignore[no-untyped-call]
