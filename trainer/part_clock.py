"""Where the seconds of a step go, and how long a watchdog should give a phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from farspan.trainer.trace import Span
from farspan.trainer.world import Progress

EXPORT_S = 1800.0
"""How long writing a checkpoint with its export may take: the bound the checkpointer itself works with."""
FIRST_TIME_S = 600.0
"""How long a phase may take before anything is known about it: first steps compile, page in and warm up."""


class PartClock:
    """Seconds of each part of a step, and the phase the watchdog sees.

    A phase is planned to last as long as the longest seen so far, so that a rank which hangs is told from a slow one.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.parts_s: dict[str, float] = {}
        self.longest_s: dict[str, float] = {}
        self.spans: list[Span] | None = None
        """Every part as it happened, where somebody wants to see it; None: nobody does."""

    @contextmanager
    def part(self, name: str, *, planned_s: float | None = None) -> Iterator[None]:
        planned = max(planned_s or 0.0, self.longest_s.get(name, 0.0)) or FIRST_TIME_S
        self.progress.phase(name, planned_s=planned)
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            seconds = ended - started
            if self.spans is not None:
                self.spans.append(Span("compute", started, ended, name))
            self.parts_s[name] = self.parts_s.get(name, 0.0) + seconds
            self.longest_s[name] = max(self.longest_s.get(name, 0.0), seconds)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        parts, self.parts_s = self.parts_s, {}
        return parts
