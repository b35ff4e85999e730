"""Peak memory of a step on this rank.

On CUDA the allocator, torch's or the planned one, keeps it. On CPU "device" memory is what torch's allocator holds:
counted by its own events during one step (the run's first, which has the longest pack), since no counter exists and
counting every step would cost a few per cent. Beside it stands the process's own high-water mark, libraries and heap
included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from farspan.memory.allocations import allocated_bytes, footprint
from farspan.memory.arena import Arena

T = TypeVar("T")


class PeakMemory:
    """Reset before a step, read after it.

    Args:
        arena: the allocator that has taken the place of torch's.
    """

    def __init__(self, device: torch.device, arena: Arena | None = None) -> None:
        self.device, self._arena = device, arena
        self.process = psutil.Process()
        self._counted_bytes: int | None = None

    def reset(self) -> None:
        self._counted_bytes = None
        if self._arena is not None:
            self._arena.statistics(restart=True)
            return
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size

    def counted(self, step: Callable[[], T], besides: int | None = None) -> T:
        """Run a step and count what CPU tensors take meanwhile; on CUDA there is no need to.

        Args:
            besides: as for `allocated_bytes`.
        """
        if self.device.type == "cuda":
            return step()
        before = allocated_bytes(besides)
        took = footprint(step, self.device)
        self._counted_bytes = before + took.peak_bytes
        return took.result

    def read(self) -> dict[str, int | None]:
        """Since the reset: `device_peak_bytes` (on CPU None where it was not counted) and `rss_peak_bytes` (CPU only);
        `host_bytes` of the process now."""
        resident = int(self.process.memory_info().rss)
        if self._arena is not None:
            seen = self._arena.statistics()
            return {
                "device_peak_bytes": seen.peak_live_bytes,
                "device_reserved_bytes": seen.peak_reserved_bytes,
                "addresses_off_plan": seen.off_plan + seen.occupied,
                "host_bytes": resident,
            }
        if self.device.type == "cuda":
            return {"device_peak_bytes": torch.cuda.max_memory_allocated(self.device), "host_bytes": resident}
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM:"))
        return {
            "device_peak_bytes": self._counted_bytes,
            "rss_peak_bytes": int(peak.split()[1]) * 1024,
            "host_bytes": resident,
        }
