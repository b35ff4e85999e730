"""The device that cells run on, and how seconds are taken on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def median_s(run: Callable[[], object], *, repeats: int = 5, warm: int = 1) -> float:
    def once() -> float:
        wait()
        start_s = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start_s

    for _ in range(warm):
        once()
    return statistics.median(once() for _ in range(repeats))
