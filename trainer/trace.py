"""`trace.json` of a run folder: lanes of work as Chrome trace events, which https://ui.perfetto.dev opens.

One file, a process for each side: the driver writes `plan` (the predicted lanes of one micro-batch) before anything
runs, rank 0 adds `measured` (its second step of an attempt: the first one compiles and pages in). Both begin at zero,
so they can be laid one above the other. A lane with several threads becomes several rows, since work within a row must
not overlap. Costs nothing but two clock readings a part while the one step is recorded; at most `MOST` pieces are kept.

Format: "Trace Event Format", Google 2016; `X` is a piece of work, `C` a level, `M` a name. Microseconds.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from farspan.trainer.run_folder import write_atomically

Process = Literal["plan", "measured"]
PIDS: Mapping[Process, int] = {"plan": 1, "measured": 2}
ROWS_A_LANE = 100
"""Room for the rows of a lane among the thread numbers."""
MOST = 20_000
"""Pieces of work and levels of a process, the earliest: some 2 MB."""


class Span(NamedTuple):
    """A piece of work."""

    lane: str
    start_s: float
    end_s: float
    name: str
    bytes: int = 0


def add_process(
    path: Path,
    process: Process,
    spans: Iterable[Span],
    *,
    begin_s: float = 0.0,
    levels: Mapping[str, Sequence[tuple[float, int]]] | None = None,
) -> None:
    """Put one process into the trace, in the place of what an earlier attempt wrote of it.

    Args:
        spans: work in any order, on one clock.
        begin_s: what that clock showed at the trace's zero.
        levels: bytes by name, each a list of (seconds, bytes from then on).
    """
    others = [event for event in _events(path) if event.get("pid") != PIDS[process]]
    own = process_events(process, spans, begin_s=begin_s, levels=levels or {})
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": others + own}, separators=(",", ":"))
    write_atomically(path, text + "\n")


def process_events(
    process: Process, spans: Iterable[Span], *, begin_s: float, levels: Mapping[str, Sequence[tuple[float, int]]]
) -> list[dict[str, Any]]:
    """The events of one process, names first."""
    pid = PIDS[process]
    ordered = sorted(spans, key=lambda span: (span.start_s, span.end_s))
    left_out = max(0, len(ordered) - MOST)
    title = f"{process}, {left_out} later pieces left out" if left_out else process
    lanes = list(dict.fromkeys(span.lane for span in ordered))
    work, rows = [], dict[int, str]()
    for place, lane in enumerate(lanes):
        free: list[tuple[float, int]] = []
        for span in ordered[:MOST]:
            if span.lane != lane:
                continue
            row = heapq.heappop(free)[1] if free and free[0][0] <= span.start_s else len(free)
            heapq.heappush(free, (span.end_s, row))
            thread = place * ROWS_A_LANE + row + 1
            rows[thread] = lane if row == 0 else f"{lane} {row + 1}"
            work.append(_work(pid, thread, span, begin_s))
    counters = [
        {"ph": "C", "pid": pid, "name": name, "ts": _us(time_s - begin_s), "args": {"bytes": size_bytes}}
        for name, points in levels.items()
        for time_s, size_bytes in points[:MOST]
    ]
    names = [_name(pid, 0, "process_name", name=title), _name(pid, 0, "process_sort_index", sort_index=pid)]
    for thread, name in rows.items():
        names.append(_name(pid, thread, "thread_name", name=name))
        names.append(_name(pid, thread, "thread_sort_index", sort_index=thread))
    return names + work + counters


def _work(pid: int, thread: int, span: Span, begin_s: float) -> dict[str, Any]:
    start, end = _us(span.start_s - begin_s), _us(span.end_s - begin_s)
    # from rounded ends, so that what followed without a gap still does not overlap
    event = {"ph": "X", "pid": pid, "tid": thread, "ts": start, "dur": round(end - start, 3), "name": span.name}
    return event | ({"args": {"bytes": span.bytes}} if span.bytes else {})


def _name(pid: int, thread: int, what: str, **value: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": thread, "name": what, "args": value}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _events(path: Path) -> list[dict[str, Any]]:
    """What is in the file; nothing when it is not there or not ours."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return [event for event in events if isinstance(event, dict)]
