"""What a piece of work allocates: peak and remainder, from the allocator's own events.

On CPU torch's profiler reports every allocation and release of its CPU allocator, those inside operators included,
which a tracker of operator outputs would miss. On CUDA the caching allocator keeps that history itself. Both count
bytes asked for, not pages touched.

The first use starts the profiler, which takes seconds; after that a measurement costs about two milliseconds plus what
profiling adds to each operator, so seconds are to be measured without it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Footprint(Generic[T]):
    """What a call left behind and what it needed on the way, relative to before."""

    result: T
    peak_bytes: int
    """Most bytes at one time, at least 0."""
    kept_bytes: int
    """Bytes at the end, the result's own included; negative if more was released than allocated."""
    events: tuple[tuple[int, int], ...] = ()
    """(nanoseconds since the epoch, bytes allocated or, negative, released), in order."""


def footprint(function: Callable[[], T], device: torch.device) -> Footprint[T]:
    """Run `function` once and count what it allocates on `device`."""
    result, events = (_cuda_history if device.type == "cuda" else _cpu_history)(function, device)
    totals = [0, *accumulate(size for _, size in events)]
    return Footprint(result, max(totals), totals[-1], tuple(events))


def _cpu_history(function: Callable[[], T], _: torch.device) -> tuple[T, list[tuple[int, int]]]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = function()
    kineto = profiler.profiler.kineto_results
    return result, sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")


def _cuda_history(function: Callable[[], T], device: torch.device) -> tuple[T, list[tuple[int, int]]]:
    torch.cuda.memory._record_memory_history("all", context=None, clear_history=True)
    try:
        result = function()
        entries = torch.cuda.memory._snapshot(device)["device_traces"][
            torch.cuda._utils._get_device_index(device, True)
        ]
    finally:
        torch.cuda.memory._record_memory_history(None)
    return result, cuda_events(entries)


def cuda_events(entries: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Events of the caching allocator's history: a block is released when it is asked to be, and its size is what was
    asked for, without rounding."""
    signs = {"alloc": 1, "free_requested": -1}
    return [(e["time_us"] * 1000, signs[e["action"]] * e["size"]) for e in entries if e["action"] in signs]


def allocated_bytes(besides: int | None = None) -> int:
    """Bytes of all CPU storages that a Python object of this process reaches: what a footprint comes on top of.

    Args:
        besides: address of a storage that is not the allocator's (the host arena).
    """
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # not isinstance: deprecated objects of other libraries warn when asked for their class
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(besides or 0, None)
    return sum(found.values())


def fastest_s(function: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs: noise only ever adds."""

    def once() -> float:
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        return time.perf_counter() - started

    return min(once() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
