"""The device whose tensors a store takes: how its memory is copied, and when that memory is ready.

On CUDA the thread that runs the model is ahead of the device. What it hands to a store may not be computed yet, and
memory it allocates may still be read by kernels queued before. So every transfer begins at a `mark`, an event on the
stream of whoever called. Each worker copies on a stream of its own, beside compute, and comes back when the copy is
done: from then on all bookkeeping (pages, slots, releasing the original) is the same as on CPU, and memory of the
compute stream is given back only when no copy uses it, which is why nothing here needs `record_stream`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy
import torch
from torch import Tensor

from farspan.errors import DoesNotFit
from farspan.memory.tiers.base import Mark
from farspan.memory.tiers.numa import on_node, pci_node

Copies = Sequence[tuple[Tensor, Tensor]]
"""(into, source), uint8 [bytes] each, contiguous; one of the two in the arena."""


Stop = Callable[[], Callable[[], float]]
"""Ends a measurement; what it returns gives the seconds, waiting for the device if it must."""


class Device(Protocol):
    """One device, from many threads."""

    torch_device: torch.device

    def mark(self) -> Mark | None:
        """What the calling thread has queued so far; None where work is done when a call returns."""

    def stopwatch(self) -> Stop:
        """Begin to measure how long the device has nothing to do while the caller waits."""

    def copy(self, copies: Copies) -> None:
        """Copy, and return when all bytes are there."""

    def near(self) -> AbstractContextManager[None]:
        """Around first touching host memory: it comes to lie near this device."""

    def pin(self, address: int, size_bytes: int) -> None:
        """Let the device copy from and to host memory by itself."""

    def unpin(self, address: int) -> None:
        """Take that back."""


def device_of(device: torch.device) -> Device:
    """How a store deals with tensors on `device`."""
    return Cuda(device) if device.type == "cuda" else Cpu()


class Cpu:
    """Host memory itself."""

    torch_device = torch.device("cpu")

    def mark(self) -> None:
        return None

    def stopwatch(self) -> Stop:
        start_s = time.perf_counter()

        def stop() -> Callable[[], float]:
            took_s = time.perf_counter() - start_s
            return lambda: took_s

        return stop

    def copy(self, copies: Copies) -> None:
        # `Tensor.copy_` would open an OpenMP team per worker thread, which takes cores from the model
        for into, source in copies:
            numpy.copyto(into.numpy(), source.numpy())

    def near(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pin(self, address: int, size_bytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass


class Cuda:
    """A CUDA device, reached through one stream per thread."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._streams = threading.local()

    def mark(self) -> _Event:
        return _Event(self.torch_device)

    def stopwatch(self) -> Stop:
        # nothing is queued between the two events: what lies between them is idleness, and nothing if the caller only
        # waited while the device still had work
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.torch_device)
        start.record(stream)

        def stop() -> Callable[[], float]:
            end.record(stream)
            return read

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return stop

    def copy(self, copies: Copies) -> None:
        stream = getattr(self._streams, "own", None)
        if stream is None:
            stream = self._streams.own = torch.cuda.Stream(self.torch_device)
        with torch.cuda.stream(stream):
            for into, source in copies:
                into.copy_(source, non_blocking=True)
            done = _Event(self.torch_device)
        done.wait()

    def near(self) -> AbstractContextManager[None]:
        return on_node(pci_node(torch.cuda.get_device_properties(self.torch_device)))

    def pin(self, address: int, size_bytes: int) -> None:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.torch_device):
            failed = int(runtime.cudaHostRegister(address, size_bytes, 0))
        if failed:
            raise DoesNotFit(
                "the host tier cannot be pinned",
                at="host memory of this rank",
                why=f"{size_bytes} bytes wanted, CUDA says: {runtime.cudaGetErrorString(runtime.cudaError(failed))}",
                try_="a smaller host memory budget, or a container that may lock memory (ulimit -l unlimited)",
            )

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


class _Event:
    """On the current stream. Whoever waits sleeps: a spinning worker would take a core from data loading."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()
