"""Line and area charts as SVG text, drawn once in Python so that the page reads without JavaScript.

A plot is an SVG stretched over its box (`preserveAspectRatio="none"`, strokes that do not scale) with tick labels as
HTML beside it: it fits a phone and a desk without redrawing. The script of the page redraws the same geometry from
the same points when a reader zooms or hides a series. Long runs are thinned to at most `MAX_POINTS` real records a
series, the lowest and the highest of each bucket, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

EXTENT = 1000.0
"""Width and height of every plot in its own units."""
MAX_POINTS = 1000

Kind = Literal["line", "faint", "dots", "reference", "area"]


@dataclass(frozen=True)
class Series:
    """One curve: `y` is None where a step has no value; areas of a chart are stacked in order."""

    key: str
    label: str
    kind: Kind
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.y) if value is not None), None)


@dataclass(frozen=True)
class Tick:
    """A label at `percent` of the way along its axis."""

    percent: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A series in the coordinates of the plot: its line, and for dots the points on it."""

    series: Series
    path: str
    points: str = ""


@dataclass
class Chart:
    """Series that share one pair of axes."""

    key: str
    title: str
    unit: str
    series: list[Series]
    from_zero: bool = False
    wide: bool = False
    steps: tuple[float, float] | None = None
    """First and last step of the run; None: of these series."""
    x_unit: str = "step"
    headroom: float = 0.06
    """Share of the values' height left free above them."""
    curves: list[Curve] = field(init=False)
    x_ticks: list[Tick] = field(init=False)
    y_ticks: list[Tick] = field(init=False)
    x_domain: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self.x_domain = self.steps if self.steps and self.steps[0] < self.steps[1] else x_domain(self.series)
        y_low, y_high = y_domain(self.series, self.from_zero, self.headroom)
        self.x_ticks = ticks(*self.x_domain, 6, whole=self.x_unit == "step")
        self.y_ticks = ticks(y_low, y_high, 4)
        self.curves = draw(self.series, self.x_domain, (y_low, y_high))

    def data(self) -> dict[str, Any]:
        """What the page's script needs to redraw and to read values at the pointer."""
        series = [
            {"key": s.key, "kind": s.kind, "x": list(s.x), "y": [_digits(value) for value in s.y]} for s in self.series
        ]
        return {"key": self.key, "fromZero": self.from_zero, "x": list(self.x_domain), "series": series}


def thinned(values: Sequence[float | None], max_points: int = MAX_POINTS) -> list[int]:
    """Indices to keep, ascending: all of a short series, else first, last, and the extremes of equal buckets."""
    if len(values) <= max_points:
        return list(range(len(values)))
    buckets = (max_points - 2) // 2
    kept = {0, len(values) - 1}
    for bucket in range(buckets):
        share = range(len(values) * bucket // buckets, len(values) * (bucket + 1) // buckets)
        known = [(value, index) for index in share if (value := values[index]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
    return sorted(kept)


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` known values; None until a first one is known."""
    recent: list[float] = []
    means: list[float | None] = []
    for value in values:
        if value is not None:
            recent = [*recent, value][-window:]
        means.append(sum(recent) / len(recent) if recent else None)
    return means


def x_domain(series: Sequence[Series]) -> tuple[float, float]:
    xs = [x for s in series if s.kind != "reference" for x in s.x] or [0.0]
    low, high = min(xs), max(xs)
    return (low, high) if high > low else (low - 1, high + 1)


def y_domain(series: Sequence[Series], from_zero: bool, headroom: float = 0.06) -> tuple[float, float]:
    """Room for every curve: from zero where the distance to zero means something, else 6 % around."""
    values = [y for s in series if s.kind != "area" for y in s.y if y is not None]
    areas = [s for s in series if s.kind == "area"]
    values += [sum(s.y[i] or 0.0 for s in areas) for i in range(len(areas[0].y))] if areas else []
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero or areas:
        # a quarter of the smallest numbers there are is zero, and an axis of no height has no ticks
        return 0.0, (high if high > 1e-300 else 1.0) * (1 + headroom)
    pad = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-12)
    return low - pad, high + pad


def draw(series: Sequence[Series], x: tuple[float, float], y: tuple[float, float]) -> list[Curve]:
    """Paths of all series; areas rest on the ones before them."""

    def at_x(value: float) -> str:
        return _coordinate((value - x[0]) / (x[1] - x[0]) * EXTENT)

    def at_y(value: float) -> str:
        return _coordinate(EXTENT - (value - y[0]) / (y[1] - y[0]) * EXTENT)

    floor: list[float] = []
    curves = []
    for one in series:
        if one.kind == "area":
            floor = floor or [0.0] * len(one.y)
            top = [low + (value or 0.0) for low, value in zip(floor, one.y, strict=True)]
            there = [f"{at_x(a)},{at_y(b)}" for a, b in zip(one.x, top, strict=True)]
            back = [f"{at_x(a)},{at_y(b)}" for a, b in zip(reversed(one.x), reversed(floor), strict=True)]
            path, floor = "M" + "L".join(there + back) + "Z", top
        elif one.kind == "reference":
            path = f"M0,{at_y(one.y[0] or 0.0)}L{_coordinate(EXTENT)},{at_y(one.y[0] or 0.0)}"
        else:
            path, pen_up = "", True
            for a, b in zip(one.x, one.y, strict=True):
                if b is not None:
                    # h0: a value between two gaps has no length, but round ends make it a dot.
                    path += f"M{at_x(a)},{at_y(b)}h0" if pen_up else f"L{at_x(a)},{at_y(b)}"
                pen_up = b is None
        known = zip(one.x, one.y, strict=True) if one.kind == "dots" else ()
        curves.append(Curve(one, path, "".join(f"M{at_x(a)},{at_y(b)}h0" for a, b in known if b is not None)))
    return curves


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[Tick]:
    """Round values inside an axis, some `about` of them, at steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    found = []
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = index * step
        text = f"{value:.0e}".replace("e-0", "e-") if decimals > 3 and value else f"{value:,.{min(decimals, 3)}f}"
        found.append(Tick(round((value - low) / (high - low) * 100, 3), text))
    if not found and not whole:  # steps of 5 can straddle an axis that few ticks were asked for
        return ticks(low, high, about + 1)
    return found


def _coordinate(value: float) -> str:
    return f"{value:.1f}"


def _digits(value: float | None) -> float | None:
    """Seven digits show every difference a plot or a reader can see, at half the size of the page."""
    return None if value is None else float(f"{value:.7g}")
