"""Peaks as functions of the rows, out of the allocator's events of a few short runs.

A run of the same work at other rows allocates the same tensors in the same order, only larger ones. So the running
total after each event is a straight line in the rows (and, where work goes tile by tile, in the rows of a tile), and
the peak at any length is the highest of these lines. A line through two peaks would be wrong wherever another moment
is the highest at a million rows than at a thousand: gradients of weights, which do not grow, lead at short lengths.

Rows and tile are told apart by runs of two tiles and of three, all of them whole. Events are matched from the front as
far as the runs agree (through the second tile) and from the back (what follows the tiles); a third tile needs what the
second did. Four runs fix three numbers, so what was matched wrongly shows and is left out. Attention over a window goes
block by block too, twice in a run and beside tiles: there a run marks where it begins and ends, and what lies between
two marks is matched by itself. Where a run's own peak is not reached that way (experts, kernels that cut rows into
blocks), a line above all peaks is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from farspan.memory.liveness import Size, peak
from farspan.memory.profile import Amount, Peak

SETTINGS = ((896, 448), (1280, 640), (1344, 448), (1920, 640))
"""(rows, rows of a tile) of the runs. At fewer rows than 768 attention kernels use other blocks."""
NOTHING = Size()
EXACT_BYTES = 64.0
"""Farthest a matched moment may be from its line."""
MISSED = 1e-3
"""Share of a run's peak that its lines may miss."""


CUT_BYTES = 5
"""No tensor of a model has this size: where one is made and released, a run is cut into parts."""


@dataclass(frozen=True)
class Run:
    """What a piece of work allocated and released, in order, in bytes relative to before."""

    rows: int
    tile_rows: int
    events: tuple[int, ...]
    before_bytes: int = 0
    """Of a part: the total at its start."""

    @property
    def totals(self) -> list[int]:
        return [*accumulate(self.events, initial=self.before_bytes)]

    def parts(self) -> list[Run]:
        """Cut at the marks."""
        cuts = [-1, *(at for at, size in enumerate(self.events) if size == CUT_BYTES), len(self.events)]
        totals = self.totals
        return [
            Run(self.rows, self.tile_rows, self.events[start + 1 : end], totals[start + 1])
            for start, end in pairwise(cuts)
        ]


def matched(runs: Sequence[Run]) -> tuple[int, int]:
    """How many events from the front, and from the back, are allocations and releases alike in all runs."""
    shortest = min(len(run.events) for run in runs)

    def agree(at: int) -> bool:
        return len({run.events[at] > 0 for run in runs}) == 1

    front = next((at for at in range(shortest) if not agree(at)), shortest)
    back = next((at for at in range(shortest) if not agree(-1 - at)), shortest)
    if front == shortest and all(len(run.events) == shortest for run in runs):
        return shortest, 0
    return front, min(back, shortest)


def lines(runs: Sequence[Run], values: Sequence[Sequence[float]]) -> list[Size]:
    """Constant, bytes per row and per row of a tile at each place, where one line gives the values of all runs."""
    equations = np.array([[1.0, run.rows, run.tile_rows] for run in runs])
    wanted = np.array(values, dtype=float)
    solved = np.linalg.lstsq(equations, wanted, rcond=None)[0]
    exact = np.abs(equations @ solved - wanted).max(axis=0, initial=0.0) <= EXACT_BYTES
    return [Size(*map(float, column)) for column in solved.round(6).T[exact] if column[2] >= 0]


def above(runs: Sequence[Run], values: Sequence[float]) -> Size:
    """The line in the rows by least squares, raised until no value lies above it."""
    rows = [run.rows for run in runs]
    slope, constant = np.polyfit(rows, values, 1)
    short = max(value - (constant + slope * at) for value, at in zip(values, rows))
    return Size(float(constant + short), float(slope))


def fit_peak(what: str, runs: Sequence[Run], less: Size = NOTHING, *, tile_rows: int) -> Peak:
    """Highest running total of the runs, less what is booked elsewhere, at any number of rows.

    Args:
        tile_rows: rows of a tile in training.
    """
    cut = [run.parts() for run in runs]
    found: list[Size] = []
    for alike in zip(*cut) if len({len(parts) for parts in cut}) == 1 else [runs]:
        totals = [part.totals for part in alike]
        front, back = matched(alike)
        found += lines(runs, [total[: front + 1] for total in totals])
        if back:
            found += lines(runs, [total[-back:] for total in totals])
    reached = [max((_at(size, run) for size in found), default=0.0) for run in runs]
    highest = [max(run.totals) for run in runs]
    if any(top - of_lines > MISSED * top for top, of_lines in zip(highest, reached)):
        found.append(above(runs, highest))
    return peak([(what, size) for size in found], less, tile_rows)


def _at(size: Size, run: Run) -> float:
    return size.constant + size.per_row * run.rows + size.per_tile_row * run.tile_rows


def fit_end(runs: Sequence[Run], *, tile_rows: int) -> Amount:
    """What is left at the end."""
    return fit_values(runs, [run.totals[-1] for run in runs], tile_rows=tile_rows)


def fit_values(runs: Sequence[Run], values: Sequence[float], *, tile_rows: int) -> Amount:
    """The line through one value of each run; where there is none, one above all."""
    found = lines(runs, [[value] for value in values])
    return (found[0] if found else above(runs, values)).amount(tile_rows)
