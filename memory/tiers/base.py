"""What a store hands out: the handle of a stored tensor with its state, the statistics, and the errors.

Four lanes move bytes, each a FIFO with threads of its own, so that a slow write never holds up a read (as SSDTrain's
separate pools, https://arxiv.org/abs/2408.10013): device to host, host to disk, disk to host, host to device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from farspan.errors import RunFailed
from farspan.memory.tiers.space import Extent

OffTier = Literal["host", "disk"]
Lane = Literal["copy_out", "disk_write", "disk_read", "copy_in"]
LANES: tuple[Lane, ...] = ("copy_out", "disk_write", "disk_read", "copy_in")


class OffloadFailed(RunFailed):
    """A tensor could not be brought to its tier or back: the disk is full or broken, or a worker failed."""


class Corrupted(OffloadFailed):
    """Bytes read from disk are not the bytes written."""


class State(Enum):
    """What a slot's bytes are good for. FREE -> FILLING -> READY <-> IN_USE -> FREE.

    `free` leads back from any of them."""

    FREE = "nothing of it is kept"
    FILLING = "on its way out; the bytes in memory are the tensor"
    READY = "all on its tier"
    IN_USE = "on its way back, or back and not picked up yet"


class Chunk(NamedTuple):
    """A part of a tensor that one I/O call moves."""

    start: int
    """First byte within the tensor."""
    bytes: int
    offset: int
    """First byte within the file; a multiple of the page size."""


class Mark(Protocol):
    """A moment in the work that a thread has queued on its device."""

    def wait(self) -> None:
        """Return when the device has come so far."""


@dataclass(eq=False)
class Job:
    """Work of a lane on a stored tensor; it is in one of the tensor's two sets until done or cancelled."""

    lane: Lane
    stored: Stored
    bytes: int
    run: Callable[[], None]
    pending: set[Job]
    after: Mark | None = None
    """The device must have made, or be done with, the memory that is read or written; None: it has."""
    future: Future[None] | None = None


@dataclass(eq=False)
class Stored:
    """Handle of a stored tensor. Fields with an underscore belong to the store and change under its lock only."""

    label: str
    tier: OffTier
    shape: torch.Size
    dtype: torch.dtype
    bytes: int
    _group: int | None
    """Layer that stored it, for `Store.admit`; None when it has reached its tier."""
    _original: Tensor | None
    """The tensor itself until it is safe elsewhere; handed back as it is when wanted earlier."""
    _version: int
    """Of the original at `put`: it may not be written to before it is copied."""
    _place: tuple[Extent, ...]
    """Pages on its tier."""
    _chunks: tuple[Chunk, ...] = ()
    _digests: dict[int, int] = field(default_factory=dict)
    _staging: Extent | None = None
    """Host pages of a tensor on its way to disk."""
    _out: Tensor | None = None
    """Where it comes back to."""
    _writing: set[Job] = field(default_factory=set)
    _reading: set[Job] = field(default_factory=set)
    _last: bool = False
    """Its pages are given up when it is back."""
    _freed: bool = False

    @property
    def state(self) -> State:
        """Derived from the work under way, so that it cannot contradict it."""
        if self._freed:
            return State.FREE
        if self._writing:
            return State.FILLING
        return State.IN_USE if self._out is not None else State.READY


class Interval(NamedTuple):
    """One piece of work of a lane, on the clock of `time.perf_counter`."""

    start_s: float
    end_s: float
    lane: Lane
    bytes: int
    label: str


@dataclass(frozen=True)
class Statistics:
    """What a store holds and did. `held` and `peak` count whole pages."""

    held_bytes: dict[str, int]
    """Now, by place: `device` (originals not copied yet), `host` (all in use of the arena), `staging` (of that, on its
    way to disk), `disk`."""
    peak_bytes: dict[str, int]
    moved_bytes: dict[Lane, int]
    busy_s: dict[Lane, float]
    """Seconds of work, summed over the threads of the lane."""
    stall_s: dict[Lane, float]
    """Seconds the device had nothing to do while a caller waited, by the lane it waited for."""
    intervals: tuple[Interval, ...]
    """The latest work, oldest first."""
