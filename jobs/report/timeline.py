"""A predicted micro-batch as a picture: lanes of work one above the other, and memory over the same seconds below.

Pure numbers in, coordinates out; `plan.html` draws them. Work is coloured by what it is for. What an evaluation tells
as one piece (a rebuild and the backward after it) is drawn as the two it consists of. A gap between two pieces of
compute is a stall, and the transfer that ends with it is what was waited for. Pieces too narrow to be seen are joined
with their neighbours, so that a page of 80 layers in long segments stays small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from farspan.jobs.plan import size
from farspan.jobs.report.charts import EXTENT, Chart, Series, Tick, thinned, ticks
from farspan.memory.prediction import Interval, Prediction, Timeline
from farspan.memory.problem import PlanProblem

LANES = ("compute", "copy_out", "disk_write", "disk_read", "copy_in")
"""In the order of the picture: what leaves above, what comes back below."""
COLOURS = {
    "forward": 0,
    "loss head": 4,
    "computed again": 3,
    "backward": 2,
    "optimizer": 7,
    "leaving the device": 1,
    "coming back": 6,
    "waiting": 5,
}
_ROLES = {
    "inner forward": "computed again",
    "embedding backward": "backward",
    "copy_out": "leaving the device",
    "disk_write": "leaving the device",
    "disk_read": "coming back",
    "copy_in": "coming back",
}
_STAGE_BEFORE = {"copy_in": "disk_read", "disk_write": "copy_out"}
NARROW = EXTENT / 2500
"""Pieces and gaps below this are joined: less than half a pixel on a wide screen."""
WIDE_PERCENT = 7.0
"""From this share of the width on a piece has room for its name."""
SAME_S = 1e-9


def span_text(seconds: float) -> str:
    """`503.9 s`, `12.3 ms`, `440 µs`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"


@dataclass(frozen=True)
class Bar:
    """A piece of work of a lane, in the coordinates of the plot."""

    start: float
    width: float
    role: str
    title: str
    """What a reader sees who points at it."""
    first: int = -1
    """Its layer, or the first of several; -1: of no layer."""
    last: int = -1
    label: str = ""
    """Its name, where it is wide enough to hold one."""

    @property
    def colour(self) -> int:
        return COLOURS[self.role]


@dataclass(frozen=True)
class Lane:
    """One row of the picture."""

    name: str
    bars: list[Bar]
    busy_s: float


@dataclass(frozen=True)
class Picture:
    """Everything `plan.html` draws over one axis of seconds."""

    lanes: list[Lane]
    unused: list[str]
    """Lanes with nothing to do, which are not drawn."""
    roles: list[tuple[str, int, float]]
    """(what, colour, seconds) for the legend; transfers may overlap compute."""
    x_ticks: list[Tick]
    end_s: float
    memory: list[Memory]


@dataclass(frozen=True)
class Memory:
    """One tier's level over time."""

    tier: str
    chart: Chart
    peak_bytes: int
    peak_what: str
    peak_left: float
    peak_bottom: float
    """Place of the peak in percent of the plot."""
    budget_bytes: int
    budget_drawn: bool
    """False: the budget is so far above that drawing it would flatten the curve."""
    levels: list[tuple[float, int]]


def picture(problem: PlanProblem, prediction: Prediction) -> Picture:
    """The picture of a prediction made with `timeline=True`."""
    timeline = prediction.timeline
    assert timeline is not None, "evaluate(..., timeline=True)"
    end_s = max((interval.end_s for interval in timeline.intervals), default=0.0) or 1.0
    pieces = [piece for interval in timeline.intervals for piece in _pieces(interval, problem)]
    pieces += _stalls(timeline)
    lanes = [_lane(name, [piece for piece in pieces if piece.lane == name], end_s) for name in LANES]
    seconds = dict.fromkeys(COLOURS, 0.0)
    for piece in pieces:
        seconds[piece.role] += piece.end_s - piece.start_s
    return Picture(
        lanes=[lane for lane in lanes if lane.bars],
        unused=[lane.name for lane in lanes if not lane.bars],
        roles=[(role, COLOURS[role], total) for role, total in seconds.items() if total > 0],
        x_ticks=ticks(0.0, end_s, 8),
        end_s=end_s,
        memory=_memory(problem, prediction, timeline, end_s),
    )


@dataclass(frozen=True)
class _Piece:
    lane: str
    start_s: float
    end_s: float
    role: str
    layer: int
    what: str
    bytes: int = 0


def _pieces(interval: Interval, problem: PlanProblem) -> Iterable[_Piece]:
    """An interval as the pieces it consists of."""
    what, _, number = interval.label.rpartition(" ")
    layer = int(number) if number.isdigit() else -1
    what = what if layer >= 0 else interval.label
    start_s, end_s = interval.start_s, interval.end_s
    if what == "rebuild and backward":
        kind = problem.kind(layer)
        turn_s = max(start_s, end_s - kind.backward_s - kind.attention_backward_s)
        yield _Piece(interval.lane, start_s, turn_s, "computed again", layer, "rebuild")
        start_s, what = turn_s, "backward"
    if end_s > start_s:
        yield _Piece(interval.lane, start_s, end_s, _ROLES.get(what, what), layer, what, interval.bytes)


def _stalls(timeline: Timeline) -> list[_Piece]:
    """Gaps of the compute lane, named after the transfer that ends with them and the one this had to wait for."""
    compute = [interval for interval in timeline.intervals if interval.lane == "compute"]
    transfers = [interval for interval in timeline.intervals if interval.lane != "compute"]
    ends = {interval.end_s: interval for interval in transfers}
    ends_of = {interval.label: interval.end_s for interval in transfers}
    found = []
    for before, after in pairwise(compute):
        start_s, end_s = before.end_s, after.start_s
        if end_s - start_s <= SAME_S:
            continue
        last = ends.get(end_s)
        lane = last.lane if last is not None else "a transfer"
        if last is not None and lane in _STAGE_BEFORE:
            stage = _STAGE_BEFORE[lane]
            turn_s = ends_of.get(last.label.replace(lane, stage), 0.0)
            if start_s < turn_s < end_s:
                found.append(_wait(stage, start_s, turn_s))
                start_s = turn_s
        found.append(_wait(lane, start_s, end_s))
    return found


def _wait(lane: str, start_s: float, end_s: float) -> _Piece:
    return _Piece("compute", start_s, end_s, "waiting", -1, f"waiting for {lane.replace('_', ' ')}")


def _lane(name: str, pieces: list[_Piece], end_s: float) -> Lane:
    bars: list[Bar] = []
    for piece in sorted(pieces, key=lambda one: one.start_s):
        bar = _bar(piece, end_s)
        if bars and bars[-1].role == bar.role and _narrow(bars[-1], bar):
            joined = (bars[-1].first, bars[-1].last, bar.first)
            first, last = min(joined), max(joined)
            what = bar.role if first == last else f"{bar.role}, layers {first} to {last}"
            width = bar.start + bar.width - bars[-1].start
            bars[-1] = replace(bars[-1], width=width, first=first, last=last, title=what)
        else:
            bars.append(bar)
    return Lane(name.replace("_", " "), bars, sum(piece.end_s - piece.start_s for piece in pieces))


def _bar(piece: _Piece, end_s: float) -> Bar:
    seconds = piece.end_s - piece.start_s
    what = piece.what.replace("_", " ")
    title = what if piece.layer < 0 else f"{what} of layer {piece.layer}"
    if piece.bytes:
        title += f": {size(piece.bytes)}"
    name = f"layer {piece.layer}" if piece.bytes else piece.role if piece.layer < 0 else f"{what} {piece.layer}"
    title += f", {span_text(seconds)} from {span_text(piece.start_s)} on"
    return Bar(
        start=round(piece.start_s / end_s * EXTENT, 2),
        width=round(seconds / end_s * EXTENT, 2),
        role=piece.role,
        title=title,
        first=piece.layer,
        last=piece.layer,
        label=name if seconds >= WIDE_PERCENT / 100 * end_s else "",
    )


def _narrow(before: Bar, after: Bar) -> bool:
    """Whether neither would be seen on its own."""
    gap = after.start - before.start - before.width
    return gap < NARROW and after.width < NARROW and (before.width < NARROW or before.first != before.last)


def _memory(problem: PlanProblem, prediction: Prediction, timeline: Timeline, end_s: float) -> list[Memory]:
    device = _tier("device", timeline.device, end_s, problem.budgets.device_bytes, prediction.device_peak_at, 0)
    if prediction.host_bytes == 0:
        return [device]
    host = _tier("host", timeline.host, end_s, problem.budgets.host_bytes, "", 2)
    return [device, host]


def lasting(levels: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    """The levels that last, and peaks even where they do not. What is let go only to be taken again is left out."""
    points: list[tuple[float, int]] = []
    for _, group in groupby(levels, key=lambda point: point[0]):
        same = list(group)
        top, before = max(same, key=lambda point: point[1]), points[-1][1] if points else 0
        points += [top, same[-1]] if top[1] > max(before, same[-1][1]) else [same[-1]]
    return points or [(0.0, 0)]


def _tier(
    tier: str, levels: Iterable[tuple[float, int]], end_s: float, budget_bytes: int, peak_what: str, colour: int
) -> Memory:
    points = lasting(levels)
    peak_s, peak_bytes = max(points, key=lambda point: point[1])
    budget_drawn = 0 < budget_bytes < 3 * peak_bytes
    scale = 2.0**30 if max(peak_bytes, budget_bytes * budget_drawn) >= 2**30 else 2.0**20
    kept = [points[index] for index in thinned([float(size_bytes) for _, size_bytes in points])]
    xs, ys = [0.0], [kept[0][1] / scale]
    for time_s, size_bytes in kept[1:]:
        xs += [time_s, time_s]
        ys += [ys[-1], size_bytes / scale]
    series = [Series(tier, tier, "line", [*xs, end_s], [*ys, ys[-1]], colour)]
    if budget_drawn:
        series.append(Series("budget", "budget", "reference", [0.0], [budget_bytes / scale], 7))
    chart = Chart(
        f"{tier}_memory",
        f"{tier.capitalize()} memory",
        "GiB" if scale == 2.0**30 else "MiB",
        series,
        from_zero=True,
        steps=(0.0, end_s),
        x_unit="s",
        headroom=0.24,
    )
    top = max(peak_bytes, budget_bytes * budget_drawn) / scale * 1.24
    return Memory(
        tier=tier,
        chart=chart,
        peak_bytes=peak_bytes,
        peak_what=peak_what,
        peak_left=round(100 * peak_s / end_s, 3),
        peak_bottom=round(100 * peak_bytes / scale / top, 3) if top else 0.0,
        budget_bytes=budget_bytes,
        budget_drawn=budget_drawn,
        levels=kept,
    )
