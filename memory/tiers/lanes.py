"""The threads of a store: a FIFO per lane, and the promise that no failure of a worker is lost or blocks the caller.

The first failure stops everything: what is queued is skipped, whoever waits is woken, and every later call of the
caller raises it. Errors of the system come as `FarspanError` already; anything else is a defect and is wrapped.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from farspan.errors import FarspanError
from farspan.memory.tiers.base import LANES, Interval, Job, Lane, Mark, OffloadFailed, Stored
from farspan.memory.tiers.device import Stop
from farspan.memory.tiers.ledger import Ledger

LONGEST_DELAY_S = 2e-3
"""Of a worker in test mode."""


class Lanes:
    """Runs jobs and tells `settle` of each tensor whose job ended, under the lock.

    Args:
        settle: called with the lock held.
        stopwatch: of the device that idles while a caller waits.
        chaos: delays every job at random; None for no delays.
    """

    def __init__(
        self,
        settle: Callable[[Stored], None],
        ledger: Ledger,
        stopwatch: Callable[[], Stop],
        *,
        disk_threads: int,
        chaos: random.Random | None,
    ) -> None:
        self.changed = threading.Condition()
        """The store's one lock; notified whenever a job ends."""
        self.closed = False
        self._settle, self._ledger, self._stopwatch, self._chaos = settle, ledger, stopwatch, chaos
        self._failure: FarspanError | None = None
        self._raised = False
        self._pools = {
            lane: ThreadPoolExecutor(disk_threads if lane.startswith("disk") else 1, f"farspan-{lane}")
            for lane in LANES
        }

    def submit(
        self,
        lane: Lane,
        stored: Stored,
        pending: set[Job],
        run: Callable[[], None],
        size_bytes: int,
        after: Mark | None = None,
    ) -> None:
        """Queue work, with the lock held, to begin when the device has come to `after`; nothing is queued any more once
        the store closes."""
        if not self.closed:
            job = Job(lane, stored, size_bytes, run, pending, after)
            pending.add(job)
            job.future = self._pools[lane].submit(self._work, job)

    def cancel(self, stored: Stored) -> None:
        """Drop the work on a tensor that has not begun, with the lock held."""
        for job in [*stored._writing, *stored._reading]:
            if job.future is not None and job.future.cancel():
                job.pending.discard(job)

    def check(self) -> None:
        """Raise a worker's failure, in every call: a step that misses a tensor cannot go on. With the lock held."""
        assert not self.closed, "the store is closed"
        if self._failure is not None:
            self._raised = True
            raise copy.copy(self._failure) from self._failure.__cause__

    def wait(self, lane: Lane | None) -> None:
        """Wait for any change, with the lock held, and count it as a stall on `lane`; None: it is none."""
        stop = self._stopwatch()
        self.changed.wait()
        if lane is not None:
            self._ledger.stalled(lane, stop())
        self.check()

    def join(self) -> None:
        """End the threads; what is queued is dropped, what runs is waited for. `closed` must be set."""
        assert self.closed
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def unheard(self) -> FarspanError | None:
        """The failure that no call has raised yet."""
        return None if self._raised else self._failure

    def _work(self, job: Job) -> None:
        with self._failing():
            if self._chaos is not None:
                time.sleep(self._chaos.random() * LONGEST_DELAY_S)
            with self.changed:
                wanted = not (job.stored._freed or self._failure or self.closed)
            if wanted:
                if job.after is not None:
                    job.after.wait()  # no work of the lane: its time is not counted
                start_s = time.perf_counter()
                job.run()
                done = Interval(start_s, time.perf_counter(), job.lane, job.bytes, job.stored.label)
                with self.changed:
                    self._ledger.worked(done)
        with self._failing(), self.changed:
            job.run = _done  # it holds the caller's tensor, which the caller's own thread is to release
            job.pending.discard(job)
            self.changed.notify_all()
            self._settle(job.stored)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever is raised becomes the failure, unless there is one already."""
        try:
            yield
        except BaseException as error:
            _forget_frames(error)
            failure = error if isinstance(error, FarspanError) else _defect(error)
            with self.changed:
                self._failure = self._failure or failure
                self.changed.notify_all()


def _done() -> None:
    pass


def _defect(error: BaseException) -> OffloadFailed:
    failure = OffloadFailed(
        "a worker of the offload store failed",
        at=threading.current_thread().name,
        why=f"{type(error).__name__}: {error}",
        try_="report this with the log; a plan that keeps all on the device needs no store",
    )
    failure.__cause__ = error
    return failure


def _forget_frames(error: BaseException | None) -> None:
    """Frames of a traceback hold views of the arena, which could then not be closed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
