"""What a store holds, moved and waited for: plain counters, kept under the store's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from farspan.memory.tiers.base import LANES, Interval, Lane, Statistics

KEPT_STALLS = 1000
KEPT_INTERVALS = 100_000
"""The oldest are dropped: a run of weeks must not fill memory with its trace."""


class Ledger:
    """Counts since the last `restart`."""

    def __init__(self) -> None:
        self.restart({})

    def restart(self, held_bytes: dict[str, int]) -> None:
        """Count anew; peaks begin at what is held."""
        self._peak_bytes = dict(held_bytes)
        self._moved_bytes = dict.fromkeys(LANES, 0)
        self._busy_s = dict.fromkeys(LANES, 0.0)
        self._stall_s = dict.fromkeys(LANES, 0.0)
        self._stalls: deque[tuple[Lane, Callable[[], float]]] = deque()
        self._intervals: deque[Interval] = deque(maxlen=KEPT_INTERVALS)

    def held(self, held_bytes: dict[str, int]) -> None:
        for place, size_bytes in held_bytes.items():
            self._peak_bytes[place] = max(size_bytes, self._peak_bytes.get(place, 0))

    def worked(self, interval: Interval) -> None:
        self._moved_bytes[interval.lane] += interval.bytes
        self._busy_s[interval.lane] += interval.end_s - interval.start_s
        self._intervals.append(interval)

    def stalled(self, lane: Lane, seconds: Callable[[], float]) -> None:
        """Seconds may be known only later, when the device has come so far."""
        self._stalls.append((lane, seconds))
        if len(self._stalls) > KEPT_STALLS:
            self._count_stall()

    def _count_stall(self) -> None:
        lane, seconds = self._stalls.popleft()
        self._stall_s[lane] += seconds()

    def read(self, held_bytes: dict[str, int]) -> Statistics:
        while self._stalls:
            self._count_stall()
        return Statistics(
            held_bytes=held_bytes,
            peak_bytes=dict(self._peak_bytes),
            moved_bytes=dict(self._moved_bytes),
            busy_s=dict(self._busy_s),
            stall_s=dict(self._stall_s),
            intervals=tuple(self._intervals),
        )
