"""The host tier: one arena per process, reserved at the start.

An anonymous `mmap` and not a torch allocation: it is page-aligned (what O_DIRECT asks of buffers), it does not show in
torch's allocation events, and there is no second allocator that rounds sizes up. It is hidden from forked children:
a data loader's fork would otherwise copy its page tables, and pages under a direct read could go to the wrong process.
Huge pages are asked for: direct I/O takes memory in contiguous pieces, and was 1.4 times as fast with them on a virtual
disk. Pages come into being when first written unless `prefault` is on, which costs some tenths of a second per GiB.

For a CUDA device the whole arena is page-locked, once and in its own size: torch's pinned allocator rounds each block
up to a power of two, which of 115 GiB wastes up to as much again. That touches all pages, near the device.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from farspan.errors import DoesNotFit, FarspanError
from farspan.memory.tiers.device import Cpu, Device
from farspan.memory.tiers.space import PAGE_BYTES, Extent, Space, whole_pages


class Arena:
    """`capacity_bytes` to allocate from by `space`, and behind them `extra_bytes` for the owner's own buffers.

    Raises:
        DoesNotFit: the system refuses so much address space, or to lock so much memory.
    """

    def __init__(
        self, capacity_bytes: int, extra_bytes: int = 0, *, prefault: bool = False, device: Device | None = None
    ) -> None:
        self.space = Space(capacity_bytes)
        self.extra = Extent(self.space.total_bytes, self.space.total_bytes + whole_pages(extra_bytes))
        reserve_bytes = max(self.extra.end, PAGE_BYTES)
        try:
            self._map = mmap.mmap(-1, reserve_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DoesNotFit(
                "the host tier cannot be reserved",
                at="host memory of this rank",
                why=f"{reserve_bytes} bytes wanted, the system says: {error.strerror}",
                try_="a smaller host memory budget, or fewer ranks on this machine",
            ) from error
        self._map.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # kernels may be built without
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device = device or Cpu()
        with self._device.near():
            if prefault and self._device.torch_device.type == "cpu":  # pinning touches all pages by itself
                self._bytes.fill_(0)
            try:
                self._device.pin(self._bytes.data_ptr(), reserve_bytes)
            except FarspanError:
                self._unmap()
                raise

    def tensor(self, extent: Extent) -> Tensor:
        """uint8 [bytes], a view."""
        return self._bytes[extent.start : extent.end]

    def view(self, extent: Extent) -> memoryview:
        """The same for system calls."""
        return self._view[extent.start : extent.end]

    def close(self) -> None:
        """Give the memory back. No view of it may be alive."""
        self._device.unpin(self._bytes.data_ptr())
        self._unmap()

    def _unmap(self) -> None:
        del self._bytes
        self._view.release()
        self._map.close()
