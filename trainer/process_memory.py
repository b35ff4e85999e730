"""Peak memory of a step on this rank: the allocator's peak on CUDA, the process's own high-water mark on CPU."""

from __future__ import annotations

import psutil
import torch


class PeakMemory:
    """Reset before a step, read after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size

    def read(self) -> dict[str, int]:
        """`device_peak_bytes` since the reset and `host_bytes` now. On CPU the device is the process."""
        resident = int(self.process.memory_info().rss)
        if self.device.type == "cuda":
            return {"device_peak_bytes": torch.cuda.max_memory_allocated(self.device), "host_bytes": resident}
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM:"))
        return {"device_peak_bytes": int(peak.split()[1]) * 1024, "host_bytes": resident}
